"""Frames → OpenVLA's pixel values, exactly as the official processor makes them (PIL's bicubic, uint8 after it)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stamo_dist.errors import CheckpointError
from stamo_dist.models.images import on_device
from stamo_dist.models.openvla.config import OpenVLAConfig

PREPROCESSOR = "preprocessor_config.json"
Triple = tuple[float, float, float]
# The released files store DINOv2's statistics rounded to bfloat16.
_DINOV2 = ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375))
_SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_LETTERBOX_FILL = (127, 127, 127)  # fill colour: the last tower's mean, for both towers


@dataclass(frozen=True)
class TowerInput:
    """The input of one tower: side of the square, and channel statistics."""

    size: int
    mean: Triple
    std: Triple


@dataclass(frozen=True)
class ImageProcessor:
    """One image → (3·towers, S, S). All towers share the geometry; each has its own normalisation."""

    views: tuple[TowerInput, ...]
    strategy: Literal["resize-naive", "resize-crop", "letterbox"] = "resize-naive"
    fill: tuple[int, int, int] = _LETTERBOX_FILL

    @classmethod
    def from_config(cls, config: OpenVLAConfig) -> ImageProcessor:
        """The released processor for these towers, for folders without `preprocessor_config.json`."""
        views = [TowerInput(t.image_size, *(_SIGLIP if "siglip" in t.model else _DINOV2)) for t in config.towers]
        return cls(tuple(views), config.resize)  # type: ignore[arg-type]

    @classmethod
    def from_folder(cls, folder: Path, config: OpenVLAConfig) -> ImageProcessor:
        """Read `preprocessor_config.json`; the stored `tvf_*` values override `means` and `stds`.

        Raises:
            CheckpointError: the file cannot be read, or its sizes are not those of the towers.
        """
        path = folder / PREPROCESSOR
        if not path.is_file():
            return cls.from_config(config)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            stored = raw.get("tvf_normalize_params") or [
                {"mean": mean, "std": std} for mean, std in zip(raw["means"], raw["stds"], strict=True)
            ]
            sizes = [int(size[-1]) for size in raw["input_sizes"]]
            views = [TowerInput(size, tuple(p["mean"]), tuple(p["std"])) for size, p in zip(sizes, stored, strict=True)]
            fill = tuple(raw.get("tvf_letterbox_fill") or _LETTERBOX_FILL)
            strategy = raw["image_resize_strategy"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); copy it again") from error
        if strategy not in ("resize-naive", "resize-crop", "letterbox"):
            raise CheckpointError(f"{path}: image_resize_strategy {strategy!r} is not known")
        if config.towers and sizes != [t.image_size for t in config.towers]:
            raise CheckpointError(f"{path}: input_sizes {sizes} are not the image_sizes of config.json")
        return cls(tuple(views), strategy, fill)

    @property
    def size(self) -> int:
        return self.views[0].size

    def __call__(self, images: Sequence[Image.Image | np.ndarray]) -> Tensor:
        """Views of one timestep → (3·towers·V, S, S) float32, view by view; images: PIL or uint8 (H, W[, 3 or 4])."""
        return torch.cat([self.normalise(self._square(image)[None])[0] for image in images])

    def _square(self, image: Image.Image | np.ndarray) -> Tensor:
        if not isinstance(image, Image.Image):
            if image.dtype != np.uint8:
                raise ValueError(f"an image is {image.dtype} {image.shape}; give uint8 (H, W, 3) or a PIL image")
            image = Image.fromarray(image)
        image = image.convert("RGB")
        if self.strategy == "letterbox":
            image = _letterbox(image, self.fill)
        size = self.size
        if self.strategy == "resize-naive":
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            width, height = image.size
            short = min(width, height)
            image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
            left, top = round((image.width - size) / 2), round((image.height - size) / 2)
            image = image.crop((left, top, left + size, top + size))
        return torch.from_numpy(np.array(image))

    def normalise(self, frames: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) of the towers' own size, on any device → float32 (B, 3·towers, S, S).

        Raises:
            ValueError: another dtype or size.
        """
        if frames.dtype != torch.uint8 or frames.shape[1:] != (self.size, self.size, 3):
            raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, not uint8 (B, {self.size}, …, 3)")
        unit = frames.permute(0, 3, 1, 2).contiguous().to(torch.float32).div(255)
        parts = []
        for view in self.views:
            mean, std = on_device(view.mean, unit.device), on_device(view.std, unit.device)
            parts.append((unit - mean) / std)
        return torch.cat(parts, dim=1)

    def to_dict(self) -> dict[str, Any]:
        """`preprocessor_config.json` in the official form."""
        sides = [v.size for v in self.views]
        square = self.strategy == "resize-naive"
        letterbox = self.strategy == "letterbox"
        return {
            "image_processor_type": "PrismaticImageProcessor",
            "image_resize_strategy": self.strategy,
            "input_sizes": [[3, s, s] for s in sides],
            "interpolations": ["bicubic"] * len(sides),
            "means": [list(v.mean) for v in self.views],
            "stds": [list(v.std) for v in self.views],
            "tvf_crop_params": [{"output_size": [s, s]} for s in sides],
            "tvf_do_letterbox": letterbox,
            "tvf_letterbox_fill": list(self.fill) if letterbox else None,
            "tvf_normalize_params": [{"inplace": False, "mean": list(v.mean), "std": list(v.std)} for v in self.views],
            "tvf_resize_params": [
                {"antialias": True, "interpolation": 3, "max_size": None, "size": [s, s] if square else s}
                for s in sides
            ],
            "use_fused_vision_backbone": len(sides) > 1,
        }


def _letterbox(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """Pad both sides of the shorter axis equally; after an odd difference the image is one pixel off square."""
    side = max(image.size)
    x, y = int((side - image.width) / 2), int((side - image.height) / 2)
    square = Image.new("RGB", (image.width + 2 * x, image.height + 2 * y), fill)
    square.paste(image, (x, y))
    return square
