"""Augmentation of uint8 frames, keyed by (seed, epoch, sample): no worker count, rank or restart changes it."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stamo_dist.pixels import to_uint8, window
from stamo_dist.recipe.sampling import OPENVLA_AREA


class Augments(Protocol):
    def __call__(self, image: NDArray[np.uint8], epoch: int, sample: int, view: int = 0) -> None:
        """Augment `image`, uint8 (H, H, 3), in place.

        `epoch`: number of earlier passes over its source; `view`: number of the camera.
        """


def augmentation(*, preset: str | None, crop: float, brightness: float, contrast: float, seed: int) -> Augments:
    """The augmentation of the recipe's `data.augment`; `seed` is the run's."""
    return (
        OpenVLAAugmentation(seed=seed) if preset == "openvla" else Augmentation(crop, brightness, contrast, seed=seed)
    )


def _draw(n: int, *, seed: int, epoch: int, sample: int, view: int) -> list[float]:
    bits = np.random.Philox(key=[seed, epoch], counter=[sample, view, 0, 0])
    return np.random.Generator(bits).random(n).tolist()


class Augmentation:
    """Random crop and resize, brightness and contrast.

    Args:
        crop: Smallest side of the square crop relative to the image; its side is uniform in [crop, 1].
        brightness: The image is multiplied by a factor uniform in [1 − brightness, 1 + brightness].
        contrast: Deviations from the image's mean are multiplied by a factor uniform in [1 − contrast, 1 + contrast].
        seed: Of the run.
    """

    def __init__(self, crop: float, brightness: float, contrast: float, *, seed: int):
        self._crop, self._brightness, self._contrast, self._seed = crop, brightness, contrast, seed

    def __call__(self, image: NDArray[np.uint8], epoch: int, sample: int, view: int = 0) -> None:
        """All views of a timestep get the same augmentation."""
        drawn = _draw(5, seed=self._seed, epoch=epoch, sample=sample, view=0)
        side, top, left, brightness, contrast = drawn
        if self._crop < 1:
            _crop_and_resize(image, 1 - (1 - self._crop) * side, top, left)
        if self._brightness or self._contrast:
            b = 1 + self._brightness * (2 * brightness - 1)
            c = 1 + self._contrast * (2 * contrast - 1)
            # ((b·x) − mean) · c + mean with mean = b·mean(x), as one factor and one offset.
            changed = np.multiply(image, np.float32(b * c), dtype=np.float32)
            changed += np.float32((1 - c) * b * image.mean() + 0.5)
            image[...] = np.clip(changed, 0, 255, out=changed)


def _crop_and_resize(image: NDArray[np.uint8], scale: float, top: float, left: float) -> None:
    height = len(image)
    side = max(1, round(scale * height))
    y, x = int(top * (height - side + 1)), int(left * (height - side + 1))
    # uint8 in channels-last order uses torch's vectorised path.
    window = torch.from_numpy(image[y : y + side, x : x + side]).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(window, size=(height, height), mode="bilinear", antialias=True)
    image[...] = resized[0].permute(1, 2, 0).numpy()


class OpenVLAAugmentation:
    """OpenVLA's training augmentation: crop, brightness, contrast, saturation, hue, in this order; each view apart.

    The official code uses one seed, and so one random number, for all five: its crops lie on the diagonal, and bright
    images have high contrast. Here each is drawn independently, from the same ranges.
    """

    def __init__(self, *, seed: int):
        self._seed = seed

    def __call__(self, image: NDArray[np.uint8], epoch: int, sample: int, view: int = 0) -> None:
        drawn = _draw(6, seed=self._seed, epoch=epoch, sample=sample, view=view)
        image[...] = openvla_changed(torch.from_numpy(image), *drawn).numpy()


def openvla_changed(
    frame: Tensor, top: float, left: float, brightness: float, contrast: float, saturation: float, hue: float
) -> Tensor:
    """uint8 (H, H, 3) → the same, changed by amounts in [0, 1], which are mapped to the official ranges."""
    side = math.sqrt(OPENVLA_AREA)
    image = frame.permute(2, 0, 1).contiguous().float() / 255
    image = window(image, top * (1 - side), left * (1 - side), side, len(frame)).contiguous()
    image.add_((brightness - 0.5) * 0.4).clamp_(0, 1)
    mean = image.mean((1, 2), keepdim=True)
    image.sub_(mean).mul_(0.8 + 0.4 * contrast).add_(mean).clamp_(0, 1)
    image = _coloured(image, 0.8 + 0.4 * saturation, (hue - 0.5) * 0.1)
    return to_uint8(image).permute(1, 2, 0).contiguous()


def _coloured(image: Tensor, saturation: float, hue: float) -> Tensor:
    """RGB (3, H, W) in [0, 1] with its HSV saturation multiplied, clipped to 1, and its hue rotated by a fraction."""
    red, green, blue = image
    value = image.amax(0)
    chroma = value - image.amin(0)
    # In place, with 0/1 masks: allocation, torch.where and remainder would dominate the time.
    is_red = (red == value).float()
    is_green = (green == value).float().mul_(1 - is_red)
    sector = (green - blue).mul_(is_red).add_((blue - red).mul_(is_green))
    is_blue = is_red.add_(is_green).neg_().add_(1)
    sector.add_((red - green).mul_(is_blue)).div_(chroma.clamp_min(1e-12))  # of 6, from -1
    sector.add_(is_green, alpha=2).add_(is_blue, alpha=4).add_(6 * hue)
    chroma = torch.minimum(chroma.mul_(saturation), value)
    # Of the distance that a channel is below the largest: a trapezium over the sectors, which begins at 5, 3 and 1.
    share = sector + torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1)
    share.sub_(5).abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1)
    return share.mul_(chroma).neg_().add_(value)
