"""Augmentation of uint8 frames, keyed by (seed, pass, sample): no worker count, rank or restart changes it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


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

    def __call__(self, image: NDArray[np.uint8], turn: int, sample: int) -> None:
        """Augment `image`, uint8 (H, H, 3), in place; `turn`: how often its source was gone through before."""
        bits = np.random.Philox(key=[self._seed, turn], counter=[sample, 0, 0, 0])
        side, top, left, brightness, contrast = np.random.Generator(bits).random(5)
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
    # uint8 in channels-last order takes torch's vectorised path.
    window = torch.from_numpy(image[y : y + side, x : x + side]).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(window, size=(height, height), mode="bilinear", antialias=True)
    image[...] = resized[0].permute(1, 2, 0).numpy()
