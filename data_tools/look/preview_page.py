"""Drawing a source: a contact sheet, and film strips with the actions below their frames."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.schema import Episode, Manifest, dimension_names
from stamo_dist.errors import DataError

WIDTH, MARGIN, LABELS, GAP = 1280, 16, 196, 3  # pixels
DPI = 100
#: Heights in pixels: of a line of text, of a plot of several dimensions, of the gripper's plot.
LINE, PLOT, GRIPPER = 15, 104, 52
#: Characters that fit beside the frames.
WRAP = 31
#: Side of a frame in pixels, at most.
LARGEST = 256
COLOURS = ("#d62728", "#2ca02c", "#1f77b4", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
LOOK = "Look at the frames: the floor is below, and writing reads from left to right."
DELTAS = (
    "dx dy dz are along the axes of the robot's base, usually forward, to its left and up: the gripper in the frames "
    "must go where they point."
)


@dataclass(frozen=True)
class PreviewedEpisode:
    """The data of one episode that is drawn."""

    episode: Episode
    times: NDArray[np.float64]  # (T,) seconds
    picked: NDArray[np.int64]  # (K,) numbers of the frames shown
    frames: dict[str, NDArray[np.uint8]]  # by camera, (K, H, W, 3)
    actions: NDArray[np.float32]  # (T, A)


@dataclass(frozen=True)
class _Plot:
    """Dimensions drawn in one plot."""

    title: str
    dimensions: list[int]
    height: int


def draw(
    manifest: Manifest, split: str, sheet: Sequence[PreviewedEpisode], strips: Sequence[PreviewedEpisode], path: Path
) -> None:
    """Write the picture, 1280 pixels wide.

    Args:
        manifest: The source's.
        split: The split that is shown.
        sheet: Episodes of the contact sheet.
        strips: Episodes whose actions are drawn.
        path: PNG to write.

    Raises:
        DataError: It cannot be written.
    """
    plots = _plots(manifest)
    header = _header(manifest)
    small, large = _side(sheet), _side(strips)
    height = sum(_rows(one, small) for one in sheet)
    height += sum(_rows(one, large) + sum(plot.height + 8 for plot in plots) + 40 for one in strips)
    page = _Page(2 * MARGIN + 34 + LINE * len(header) + 38 + height + (36 if strips else 0))

    page.text(MARGIN, MARGIN, manifest.name, 15, weight="bold")
    y = MARGIN + 34
    page.text(MARGIN, y, "\n".join(header), 8.5, linespacing=1.3)
    y += LINE * len(header) + 12
    y = page.heading(y, f"Contact sheet: {len(sheet)} of {manifest.splits[split].episodes} episodes of split {split}")
    for one in sheet:
        y = _frames(page, y, one, small)
    if strips:
        y = page.heading(y + 10, "Film strips, with the actions taken")
    for one in strips:
        y = _frames(page, y, one, large)
        y = _draw_plots(page, y, one, plots, dimension_names(manifest, "action"), large) + 40
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page.figure.savefig(path, dpi=DPI)
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror or e}") from e


def _side(shown: Sequence[PreviewedEpisode]) -> int:
    """Side of a frame in pixels, so that a row fills the page; small frames are not enlarged."""
    columns = max((len(one.picked) for one in shown), default=1)
    return min((WIDTH - 2 * MARGIN - LABELS) // columns - GAP, LARGEST)


class _Page:
    """A figure measured in pixels from its top left corner."""

    def __init__(self, height: int):
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")

    def text(self, x: float, y: float, text: str, size: float = 7.5, **style: Any) -> None:
        style = {"va": "top", "parse_math": False, **style}
        self.figure.text(x / WIDTH, 1 - y / self.height, text, fontsize=size, **style)

    def heading(self, y: int, text: str) -> int:
        self.text(MARGIN, y, text, 10, weight="bold")
        return y + 26

    def image(self, x: int, y: int, image: NDArray[np.uint8], side: int) -> None:
        from PIL import Image

        scaled = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
        self.figure.figimage(scaled, x, self.height - y - side, origin="upper")

    def axes(self, x: int, y: int, width: int, height: int) -> Any:
        return self.figure.add_axes((x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height))


def _header(manifest: Manifest) -> list[str]:
    counts = ", ".join(f"{name} {s.episodes} episodes of {s.frames} frames" for name, s in manifest.splits.items())
    skipped = f" · {len(manifest.skipped)} episodes skipped" if manifest.skipped else ""
    facts = [
        f"{manifest.source_format} · {manifest.image_size} px · {manifest.rate_hz:g} Hz · cameras "
        f"{', '.join(manifest.cameras)} · {counts}{skipped}",
        f"action ({manifest.action_dim}): {manifest.convention}" if manifest.action_dim else "no actions",
        " ".join([LOOK, *([DELTAS] if "dx" in dimension_names(manifest, "action") else [])]),
    ]
    return [line for fact in facts for line in textwrap.wrap(fact, 185)]


def _plots(manifest: Manifest) -> list[_Plot]:
    names = dimension_names(manifest, "action")
    if "rx" in names:
        plots = [_Plot("translation in m", [0, 1, 2], PLOT), _Plot("rotation in rad", [3, 4, 5], PLOT)]
    else:
        rest = [d for d in range(manifest.action_dim) if d != manifest.gripper]
        plots = [_Plot("action", rest, PLOT)] if rest else []
    return plots + ([_Plot("gripper", [manifest.gripper], GRIPPER)] if manifest.gripper is not None else [])


def _short(id: str) -> str:
    """An episode's id in one line; of a long one the end, which tells it from the others."""
    return id if len(id) <= WRAP else f"…{id[1 - WRAP :]}"


def _rows(one: PreviewedEpisode, side: int) -> int:
    """Height in pixels of an episode's frames."""
    return len(one.frames) * (max(side, LINE * 2) + GAP) + 6


def _frames(page: _Page, y: int, one: PreviewedEpisode, side: int) -> int:
    """Draw one row of frames per camera; returns the y position below them."""
    label = [_short(one.episode.id)]
    label += textwrap.wrap(one.episode.instruction or one.episode.task or "(no instruction)", WRAP)[:3]
    label.append(f"{one.episode.length} frames, {one.times[-1] - one.times[0]:.1f} s")
    for n, (camera, frames) in enumerate(one.frames.items()):
        page.text(MARGIN, y + 1, camera, weight="bold")
        if n == 0:
            fits = max(1, (side - LINE) // 12) if len(one.frames) > 1 or side < 100 else len(label)
            page.text(MARGIN, y + LINE, "\n".join(label[:fits]), linespacing=1.25)
        for k, frame in enumerate(frames):
            x = MARGIN + LABELS + k * (side + GAP)
            page.image(x, y, frame, side)
            seconds = f"{one.times[one.picked[k]] - one.times[0]:.1f} s"
            box = {"facecolor": "black", "alpha": 0.55, "pad": 1.2, "linewidth": 0}
            page.text(x + 4, y + side - 4, seconds, 6.5, va="bottom", color="white", bbox=box)
        y += max(side, LINE * 2) + GAP
    return y + 6


def _draw_plots(
    page: _Page, y: int, one: PreviewedEpisode, plots: Sequence[_Plot], names: Sequence[str], side: int
) -> int:
    """Plot the actions; the middle of frame k is at x = k, so that an action is below the frame it was taken at."""
    count = len(one.picked)
    shown = one.times[one.picked]
    at = np.interp(one.times, shown, np.arange(count))
    ends = np.append(at, at[-1] + (at[-1] - at[-2] if len(at) > 1 else 0.5))  # the last action is one step wide, too
    for plot in plots:
        axes = page.axes(MARGIN + LABELS, y, count * (side + GAP) - GAP, plot.height)
        for n, d in enumerate(plot.dimensions):
            colour = COLOURS[n % len(COLOURS)]
            values = np.append(one.actions[:, d], one.actions[-1, d])
            axes.plot(ends, values, color=colour, linewidth=1.2, drawstyle="steps-post")
            page.text(MARGIN + 52 * (n // 6), y + LINE * (1 + n % 6), names[d], 8, color=colour, weight="bold")
        page.text(MARGIN, y, plot.title, 8)
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_xticks(np.arange(count), [f"{moment - one.times[0]:.1f} s" for moment in shown])
        axes.tick_params(labelsize=6.5, length=2, pad=2)
        axes.tick_params(axis="x", labelbottom=plot is plots[-1])
        axes.grid(axis="y", linewidth=0.3)
        axes.grid(axis="x", color="0.55", linewidth=0.8, linestyle=":")
        if plot.title == "gripper":
            axes.set_ylim(-0.15, 1.15)
        y += plot.height + 8
    return y
