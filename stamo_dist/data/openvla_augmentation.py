"""OpenVLA's augmentation of uint8 frames."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stamo_dist.data.transforms import draw
from stamo_dist.pixels import to_uint8, window
from stamo_dist.recipe.sampling import OPENVLA_AREA


class OpenVLAAugmentation:
    """OpenVLA's training augmentation: crop, brightness, contrast, saturation, hue, in this order; each view apart.

    The official code uses one seed, and so one random number, for all five: its crops lie on the diagonal, and bright
    images have high contrast. Here each is drawn independently, from the same ranges.
    """

    def __init__(self, *, seed: int):
        self._seed = seed

    def __call__(self, image: NDArray[np.uint8], epoch: int, sample: int, view: int = 0) -> None:
        drawn = draw(6, seed=self._seed, epoch=epoch, sample=sample, view=view)
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
