"""Image metrics, on images (B, 3, H, W) in [0, 1].

Every measurement imports this module; torchmetrics, which takes longer to import than a rollout, only who needs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import stamo_dist.models  # noqa: F401  # isort: skip  must precede torchmetrics, which imports torchvision

MAX_PSNR = 100.0
#: torchvision's ImageNet weights of AlexNet, used by LPIPS (Zhang et al. 2018).
ALEXNET = "alexnet-owt-7be5be79.pth"


class LPIPS:
    """Perceptual distance by AlexNet, if its weights are in torch's hub folder: nothing is downloaded.

    The linear weights on top of it come with torchmetrics.
    """

    def __init__(self, device: torch.device) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self._net = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device).net

    @staticmethod
    def weights() -> Path:
        """The path at which AlexNet's weights are expected."""
        return Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET

    @classmethod
    def at_hand(cls, device: torch.device) -> LPIPS | None:
        return cls(device) if cls.weights().is_file() else None

    @torch.no_grad()
    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """LPIPS of each image, (B,); lower is better. Images too small for AlexNet are enlarged to 64 pixels."""
        if images.shape[-1] < 64:
            images, truth = (F.interpolate(x, size=64, mode="bilinear", antialias=True) for x in (images, truth))
        distance: Tensor = self._net(images.clamp(0, 1), truth.clamp(0, 1), normalize=True)
        return distance.flatten()


def psnr(images: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """PSNR of each image, (B,) in dB: 10·log₁₀(1 / MSE).

    `where` (H, W) bool: over these pixels only; NaN if there are none. At most MAX_PSNR, so that means over exact
    copies stay finite.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if where is not None:
        if not where.any():
            return torch.full((len(images),), torch.nan, device=images.device)
        images, truth = images[..., where], truth[..., where]
    dims = tuple(range(1, images.ndim))
    return peak_signal_noise_ratio(images, truth, data_range=1.0, reduction="none", dim=dims).clamp(max=MAX_PSNR)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """SSIM of each image, (B,): Gaussian window of 11 pixels, σ = 1.5 (Wang et al. 2004)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(-1)


def order(points: Tensor) -> tuple[float, float]:
    """How monotonically points (T, …) advance along the straight line from the first to the last.

    Rank correlation (Spearman) of their projection with time, and the share of the T − 1 steps that go forward; NaN
    if both ends are the same point.
    """
    from torchmetrics.functional import spearman_corrcoef

    points = points.flatten(1).to("cpu", torch.float64)
    line = points[-1] - points[0]
    if not line.any():
        return float("nan"), float("nan")
    along = (points - points[0]) @ line
    time = torch.arange(len(along), dtype=torch.float64)
    return spearman_corrcoef(along, time).item(), (along.diff() > 0).to(torch.float64).mean().item()


def means(table: Sequence[Sequence[float]]) -> list[float | None]:
    """Mean of each column without NaN; None (for JSON) if all are NaN."""
    return [None if math.isnan(x) else x for x in torch.tensor(table, dtype=torch.float64).nanmean(0).tolist()]
