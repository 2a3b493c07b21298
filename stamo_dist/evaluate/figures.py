"""Figures of a measurement, with transparent background and mid-grey text for light and dark pages."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP, _TEXT, _GREY = 4, 14, (128, 128, 128, 255)


def _picture(image: Tensor, cell: int) -> Image.Image:
    """Float image (3, H, W) in [0, 1] → RGB of `cell` × `cell` pixels."""
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels).resize((cell, cell), Image.Resampling.BICUBIC)


def save_grid(
    path: Path, rows: Sequence[Sequence[Tensor]], *, headings: Sequence[str] = (), labels: Sequence[str] = (), cell: int
) -> None:
    """Write rows of float images (3, H, W) in [0, 1] as one PNG, with headings above and labels left of them."""
    font = ImageFont.load_default(_TEXT)
    left = max((int(font.getlength(line)) + 2 * _GAP for label in labels for line in label.split("\n")), default=0)
    top = _TEXT + 2 * _GAP if headings else 0
    pitch = cell + _GAP
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGBA", (left + columns * pitch - _GAP, top + len(rows) * pitch - _GAP), (0, 0, 0, 0))
    draw = ImageDraw.Draw(sheet)
    for j, heading in enumerate(headings):
        draw.text((left + j * pitch + cell / 2, top / 2), heading, fill=_GREY, font=font, anchor="mm")
    for i, row in enumerate(rows):
        y = top + i * pitch
        if labels:
            draw.multiline_text(
                (left - 2 * _GAP, y + cell / 2), labels[i], fill=_GREY, font=font, anchor="rm", align="right"
            )
        for j, image in enumerate(row):
            sheet.paste(_picture(image, cell), (left + j * pitch, y))
    sheet.save(path)


def save_gif(path: Path, frames: Sequence[Sequence[Tensor]], *, cell: int, fps: float = 6) -> None:
    """Write a GIF that loops forward and back; each frame is a row of float images (3, H, W) side by side."""
    sheets = []
    for row in frames:
        sheet = Image.new("RGB", (len(row) * (cell + _GAP) - _GAP, cell), "white")
        for j, image in enumerate(row):
            sheet.paste(_picture(image, cell), (j * (cell + _GAP), 0))
        sheets.append(sheet)
    sheets += sheets[-2:0:-1]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=round(1000 / fps), loop=0)


def save_motion(strip: Path, gif: Path, rows: Mapping[str, Tensor], headings: Sequence[str], cell: int) -> None:
    """Write rows of images (T, 3, H, W), by label, below each other as PNG and beside each other as GIF."""
    images = [list(row) for row in rows.values()]
    save_grid(strip, images, headings=headings, labels=list(rows), cell=cell)
    save_gif(gif, list(zip(*images, strict=True)), cell=cell)


def save_lines(
    path: Path, xs: Sequence[float], lines: Mapping[str, Sequence[float | None]], *, x: str, y: str, strong: str
) -> None:
    """Write a chart of named lines over `xs` as PNG; `strong` is drawn bold, missing values leave gaps."""
    from matplotlib.figure import Figure as Chart

    grey = "#808080"
    chart = Chart(figsize=(6.4, 4), dpi=110, layout="constrained")
    axes = chart.subplots()
    for name, values in lines.items():
        heights = [float("nan") if value is None else value for value in values]
        axes.plot(xs, heights, marker="o", label=name, linewidth=3 if name == strong else 1.4)
    axes.set_xticks(list(xs), [f"{value:g}" for value in xs], color=grey)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x, color=grey)
    axes.set_ylabel(y, color=grey)
    axes.tick_params(colors=grey)
    axes.spines[:].set_color(grey)
    axes.set_facecolor("none")
    axes.legend(frameon=False, labelcolor=grey, fontsize=8)
    chart.savefig(path, transparent=True)


def cell_size(image_size: int) -> int:
    """Side of a grid cell in pixels: small frames are enlarged, large ones shrunk to fit side by side."""
    return min(max(image_size, 144), 224)


def file_name(name: str, suffix: str = "") -> str:
    """A source's name as a file name; a changed name gets a checksum, so that two names stay distinct."""
    plain = re.sub(r"[^\w.-]", "_", name)
    return (plain if plain == name else f"{plain}_{zlib.crc32(name.encode()):08x}") + (f".{suffix}" if suffix else "")
