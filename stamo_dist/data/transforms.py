"""Augmentation of uint8 frames, keyed by (seed, epoch, sample): no worker count, rank or restart changes it.

Loader workers import this module, which imports torch only for what is resized with it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Augments(Protocol):
    def __call__(self, image: NDArray[np.uint8], epoch: int, sample: int, view: int = 0) -> None:
        """Augment `image`, uint8 (H, H, 3), in place.

        `epoch`: number of earlier passes over its source; `view`: number of the camera.
        """


def augmentation(*, preset: str | None, crop: float, brightness: float, contrast: float, seed: int) -> Augments:
    """The augmentation of the recipe's `data.augment`; `seed` is the run's."""
    if preset != "openvla":
        return Augmentation(crop, brightness, contrast, seed=seed)
    from stamo_dist.data.openvla_augmentation import OpenVLAAugmentation

    return OpenVLAAugmentation(seed=seed)


def draw(n: int, *, seed: int, epoch: int, sample: int, view: int) -> list[float]:
    """`n` numbers in [0, 1)."""
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
        drawn = draw(5, seed=self._seed, epoch=epoch, sample=sample, view=0)
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
    import torch

    height = len(image)
    side = max(1, round(scale * height))
    y, x = int(top * (height - side + 1)), int(left * (height - side + 1))
    # uint8 in channels-last order uses torch's vectorised path.
    window = torch.from_numpy(image[y : y + side, x : x + side]).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(window, size=(height, height), mode="bilinear", antialias=True)
    image[...] = resized[0].permute(1, 2, 0).numpy()
