"""Converting frames to the float images that all models take."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) in 0…255, or float (B, 3, H, W) in [0, 1] → float32 (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: another dtype or shape.
    """
    if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[-1] == 3:
        return images.permute(0, 3, 1, 2).to(torch.float32).div_(255)
    if images.is_floating_point() and images.ndim == 4 and images.shape[1] == 3:
        return images.to(torch.float32)
    raise ValueError(
        f"images are {images.dtype} {tuple(images.shape)}; give uint8 (B, H, W, 3) or float (B, 3, H, W) in [0, 1]"
    )


def resize(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] → (B, 3, size, size) in [0, 1] by antialiased bicubic interpolation."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp_(0, 1)


# Not module buffers, as an engine that casts a module to bf16 casts its buffers, too.
@functools.cache
def on_device(of_channel: tuple[float, float, float], device: torch.device) -> Tensor:
    """Numbers of the three channels as (3, 1, 1), copied to the device once, as each copy makes the host wait."""
    with unset_fake_temporarily():  # in a shapes-only context, a fake tensor would stay in the cache
        return torch.tensor(of_channel, device=device).view(3, 1, 1)


def imagenet_normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] → zero mean and unit variance by ImageNet's statistics, as DINOv2 was trained."""
    return (images - on_device(IMAGENET_MEAN, images.device)) / on_device(IMAGENET_STD, images.device)
