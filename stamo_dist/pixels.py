"""The two operations that OpenVLA's training and its evaluation share, as TensorFlow has them."""

from __future__ import annotations

import torch
from torch import Tensor


def window(image: Tensor, top: float, left: float, side: float, size: int) -> Tensor:
    """Cut a square out of float (3, H, W) and scale it to (3, size, size), bilinearly between the pixels' centres.

    `top`, `left` and `side` are shares of the image's height and width. Equal to `tf.image.crop_and_resize`, which
    neither smooths nor looks beyond the window's corners.
    """
    for axis, start in ((1, top), (2, left)):
        last = image.shape[axis] - 1
        at = torch.linspace(start * last, (start + side) * last, size).clamp_(0, last)
        below = at.floor().long().clamp_max_(max(0, last - 1))
        share = (at - below).unsqueeze(-1) if axis == 1 else at - below
        above = (below + 1).clamp_max_(last)
        image = torch.lerp(image.index_select(axis, below), image.index_select(axis, above), share)
    return image


def to_uint8(image: Tensor) -> Tensor:
    """Float of [0, 1] → uint8, as `tf.image.convert_image_dtype` rounds."""
    return (image.clamp(0, 1) * 255.5).to(torch.uint8)
