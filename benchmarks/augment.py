"""Milliseconds of one core that augmenting a frame takes, beside Pillow doing the same and beside decoding the JPEG.

python benchmarks/augment.py [--size 224] [--frames 300]

All take turns frame by frame; given is the median of each and its ratio to decoding, which a loader does anyway.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from rich.console import Console
from rich.table import Table

from stamo_dist.data.transforms import augmentation

PLAIN, OPENVLA = "data.augment: crop, brightness, contrast", "data.augment.preset: openvla"
PILLOW = "Pillow, the same five operations"


def with_pillow(image: NDArray[np.uint8], n: int) -> None:
    """Crop, brightness, contrast, saturation and hue by amounts drawn for frame `n`."""
    drawn = np.random.default_rng(n).random(6)
    size, side = len(image), round(0.95 * len(image))
    x, y = (int(share * (size - side)) for share in drawn[:2])
    frame = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
    for enhance, amount in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), drawn[2:5], strict=True
    ):
        frame = enhance(frame).enhance(0.8 + 0.4 * amount)
    hue, *others = frame.convert("HSV").split()
    turn = int(25 * (drawn[5] - 0.5))
    image[...] = np.asarray(Image.merge("HSV", [hue.point(lambda h: (h + turn) % 256), *others]).convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="of the frames, px (%(default)s)")
    parser.add_argument("--frames", type=int, default=300, help="(%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    y, x = np.mgrid[: options.size, : options.size]
    picture = np.stack([127 + 120 * np.sin(x / 17), 127 + 120 * np.cos(y / 23), (x + y) / 4], -1).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(picture, 95)
    ours: dict[str, Any] = {
        name: augmentation(preset=preset, crop=0.9, brightness=0.2, contrast=0.2, seed=0)
        for name, preset in ((PLAIN, None), (OPENVLA, "openvla"))
    }
    rows: dict[str, Callable[[NDArray[np.uint8], int], object]] = {
        "decoding": lambda _image, _n: simplejpeg.decode_jpeg(jpeg),
        **{name: lambda image, n, change=change: change(image, 0, n) for name, change in ours.items()},
        PILLOW: with_pillow,
    }
    took: dict[str, list[float]] = {name: [] for name in rows}
    for n in range(options.frames + 5):
        for name, work in rows.items():
            image = picture.copy()
            begin = time.process_time()
            work(image, n)
            if n >= 5:
                took[name].append(time.process_time() - begin)
    table = Table(title=f"One frame of {options.size} px on one core, {options.frames} frames")
    for column in ("", "ms", "× decoding"):
        table.add_column(column, justify="right" if column else "left")
    limit = statistics.median(took["decoding"])
    for name, seconds in took.items():
        median = statistics.median(seconds)
        table.add_row(name, f"{1e3 * median:.2f}", f"{median / limit:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
