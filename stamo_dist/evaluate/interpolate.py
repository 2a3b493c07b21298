"""Motion interpolation: the decoded straight line between two states of an episode, beside the real frames between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from stamo_dist.engine.runfolder import open_run
from stamo_dist.errors import DataError
from stamo_dist.evaluate.common import (
    Figure,
    Result,
    known,
    load_tokenizer,
    output_folder,
    progress,
    read_recipe,
    sampler_noise,
)
from stamo_dist.evaluate.figures import cell_size, file_name, save_gif, save_grid
from stamo_dist.evaluate.held_out import MOVING_RULE, SPLIT, Source, load, open_sources, reference, spread
from stamo_dist.evaluate.metrics import order, psnr
from stamo_dist.models.images import to_float
from stamo_dist.models.tokenizer import Tokenizer

NAME = "interpolate"
FADE, LINE, OWN = KINDS = ("cross-fade", "line of states", "own states")
_COLUMNS = {
    "source": "source",
    "image": "image",
    "episodes": "episodes",
    "psnr": "PSNR dB",
    "psnr_moving": "moving dB",
    "spearman": "order",
    "increasing": "forward",
}
_ABOUT = (
    f"Split {SPLIT!r}, first camera: the straight line of states from one frame of an episode to a later one. PSNR of "
    "the pictures between the ends against the real frames at the same times, over all and over the moving pixels: for "
    "the decoded line, for a cross-fade of the two real ends (no model), and for each real frame's own state decoded "
    "(what the tokenizer can reach). The states of all real frames between (their pixels, for the cross-fade) are "
    "projected on the line: order is the rank correlation (Spearman) of the projection with time, forward the share of "
    f"steps that go forward. {MOVING_RULE}"
)


def interpolate(
    run_path: Path,
    *,
    checkpoint: str | None = None,
    episodes: int = 4,
    points: int = 9,
    start: int = 0,
    span: int = 32,
    steps: int | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> Result:
    """Interpolate at most `episodes` held-out episodes of each source and write RUN/eval/interpolate/.

    `points`: pictures on the line, ends included, 3 or more. The line goes from frame `start` to `start + span`, or to
    the episode's last frame. `steps`: of the sampler, the recipe's when omitted. `out`: another folder to write to.

    Raises:
        StamoError: No such run, no checkpoint yet, a source without a held-out split or without a long enough episode;
            nothing was written.
    """
    console = console or Console()
    run = open_run(run_path)
    recipe = read_recipe(run)
    sources = open_sources(recipe)
    chosen = {source.name: _choose(source, episodes, start) for source in sources}
    tokenizer, provenance = load_tokenizer(run, recipe, checkpoint)
    folder = output_folder(run, NAME, out)
    steps = steps or recipe.flow.sampler_steps

    rows, strips, gifs = [], [], []
    with progress(console) as bar:
        tasks = {name: bar.add_task(name, total=len(indices)) for name, indices in chosen.items()}
        for source in sources:
            moving = reference(source.train).moving.to(tokenizer.device)
            scores: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
            for index in chosen[source.name]:
                episode = source.held_out.episodes[index]
                goal = min(start + span, episode.length - 1)
                frames = load(source.held_out, index, range(start, goal + 1)).to(tokenizer.device)
                count = min(points, len(frames))
                at = [round(i * (len(frames) - 1) / (count - 1)) for i in range(count)]
                line = Line(tokenizer, frames, at, episode.start + start, steps)
                for kind, values in line.scores(moving).items():
                    scores[kind].append(values)
                stem = file_name(f"{source.name}_{index}")
                line.draw(folder / f"{stem}.png", folder / f"{stem}.gif", [f"frame {start + t}" for t in at])
                where = f"{source.name}, {episode.id}, frames {start} to {goal}"
                strips.append(Figure(f"{stem}.png", f"{where}: {LINE} above the real frames"))
                gifs.append(Figure(f"{stem}.gif", f"{where}: {LINE} beside the real frames"))
                bar.advance(tasks[source.name])
            rows += [_row(source.name, kind, values) for kind, values in scores.items()]

    settings = {"episodes": episodes, "points": points, "start": start, "span": span, "steps": steps}
    result = Result(
        NAME, "Interpolation of states", _ABOUT, _COLUMNS, rows, settings, provenance, [], strips + gifs,
        by=["source", "image"], better=dict.fromkeys(("psnr", "psnr_moving", "spearman"), "higher"),
    )  # fmt: skip
    result.write(folder)
    result.show(console, folder)
    return result


def _choose(source: Source, episodes: int, start: int) -> list[int]:
    """Evenly spaced episodes among those that have a frame between `start` and a goal."""
    lengths = [episode.length for episode in source.held_out.episodes]
    possible = [i for i, length in enumerate(lengths) if length >= start + 3]
    if not possible:
        raise DataError(
            f"data.sources.{source.name}: the longest held-out episode has {max(lengths)} frames, a line from frame "
            f"{start} needs {start + 3}; choose an earlier --start or convert longer episodes"
        )
    return [possible[i] for i in spread(episodes, len(possible))]


class Line:
    """Pictures along one line, at the times `at` of uint8 frames (T, H, W, 3); all decoded from the same noise."""

    def __init__(self, tokenizer: Tokenizer, frames: Tensor, at: Sequence[int], sample: int, steps: int):
        states, pixels = tokenizer.encode(frames), to_float(frames)
        share = torch.tensor(at, device=states.device) / at[-1]
        noise = sampler_noise(tokenizer, [sample]).expand(len(at), -1, -1, -1)
        self.truth = pixels[at]
        self.pictures = {
            FADE: torch.lerp(pixels[0], pixels[-1], share.view(-1, 1, 1, 1)),
            LINE: tokenizer.decode(torch.lerp(states[0], states[-1], share.view(-1, 1, 1)), steps, noise),
            OWN: tokenizer.decode(states[at], steps, noise),
        }
        self.order = {FADE: order(pixels), LINE: order(states), OWN: (float("nan"), float("nan"))}

    def scores(self, moving: Tensor) -> dict[str, list[float]]:
        """Picture → PSNR, PSNR over the moving pixels (means over the pictures between the ends), and the order."""
        truth = self.truth[1:-1]
        return {
            kind: [psnr(images[1:-1], truth, where).mean().item() for where in (None, moving)] + [*self.order[kind]]
            for kind, images in self.pictures.items()
        }

    def draw(self, strip: Path, gif: Path, headings: Sequence[str]) -> None:
        rows, cell = [list(self.pictures[LINE]), list(self.truth)], cell_size(self.truth.shape[-1])
        save_grid(strip, rows, headings=headings, labels=[LINE, "real frames"], cell=cell)
        save_gif(gif, list(zip(*rows, strict=True)), cell=cell)


def _row(source: str, kind: str, values: Sequence[Sequence[float]]) -> dict[str, object]:
    means = torch.tensor(values, dtype=torch.float64).nanmean(0).tolist()
    scores = {key: known(mean) for key, mean in zip(list(_COLUMNS)[3:], means, strict=True)}
    return {"source": source, "image": kind, "episodes": len(values), **scores}
