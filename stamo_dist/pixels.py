"""Two image operations shared by OpenVLA's training and evaluation, equal to TensorFlow's."""

from __future__ import annotations

import torch
from torch import Tensor


def window(image: Tensor, top: float, left: float, side: float, size: int) -> Tensor:
    """Crop a square from float (3, H, W) and resize it to (3, size, size), bilinearly between pixel centres.

    `top`, `left` and `side` are fractions of the image's height and width. Equal to `tf.image.crop_and_resize`, which
    does no antialiasing and samples only within the window's corners.
    """
    for start in (top, left):  # rows, then columns after a transposing copy: indexing rows is many times faster
        image = image.contiguous()
        last = image.shape[1] - 1
        at = torch.linspace(start * last, (start + side) * last, size).clamp_(0, last)
        below = at.floor().long().clamp_max_(max(0, last - 1))
        above = (below + 1).clamp_max_(last)
        picked = torch.lerp(image.index_select(1, below), image.index_select(1, above), (at - below).unsqueeze(-1))
        image = picked.transpose(1, 2)
    return image


def to_uint8(image: Tensor) -> Tensor:
    """Float of [0, 1] → uint8, as `tf.image.convert_image_dtype` rounds."""
    return image.clamp(0, 1).mul_(255.5).to(torch.uint8)
