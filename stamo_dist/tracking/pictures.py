"""Writing images of frames without a plotting library in the training process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor


def save_grid(path: Path, images: Tensor, labels: Sequence[str] = (), columns: int = 8, cell: int = 128) -> None:
    """Write uint8 frames (B, H, W, 3) as one PNG, each enlarged or shrunk to `cell` pixels under its label."""
    frames = images.cpu().numpy()
    columns = min(columns, len(frames))
    header = 14 if labels else 0
    rows = math.ceil(len(frames) / columns)
    sheet = Image.new("RGB", (columns * (cell + 2), rows * (cell + header + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, frame in enumerate(frames):
        x, y = i % columns * (cell + 2), i // columns * (cell + header + 2)
        if labels:
            draw.text((x + 2, y), labels[i][:20], fill="black")
        sheet.paste(Image.fromarray(np.ascontiguousarray(frame)).resize((cell, cell)), (x, y + header))
    sheet.save(path)
