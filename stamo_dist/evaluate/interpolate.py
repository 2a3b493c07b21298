"""Motion interpolation: the decoded straight line between two states of an episode, beside the real frames between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from stamo_dist.errors import DataError
from stamo_dist.evaluate.common import (
    Figure,
    Result,
    known,
    load_tokenizer,
    output_folder,
    partial,
    progress,
    read_recipe,
    sampler_noise,
)
from stamo_dist.evaluate.crew import Crew
from stamo_dist.evaluate.figures import cell_size, file_name, save_gif, save_grid
from stamo_dist.evaluate.held_out import MOVING_RULE, SPLIT, Source, identity, load, open_sources, reference, spread
from stamo_dist.evaluate.metrics import order, psnr
from stamo_dist.models.images import to_float
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.run.folder import open_run

NAME = "interpolate"
FADE, LINE, OWN = KINDS = ("cross-fade", "line of states", "own states")
Scores = dict[str, list[float]]
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
    crew: Crew = Crew(),  # noqa: B008 (frozen)
) -> Result:
    """Interpolate at most `episodes` held-out episodes of each source and write RUN/eval/interpolate/.

    `points`: pictures on the line, ends included, 3 or more. The line goes from frame `start` to `start + span`, or to
    the episode's last frame. `steps`: of the sampler, the recipe's when omitted. `out`: another folder to write to.
    `crew`: processes that measure together; the first writes the table. Started again after a kill it goes on.

    Raises:
        StamoError: No such run, no checkpoint yet, a source without a held-out split or without a long enough episode;
            nothing was written.
    """
    console = crew.console(console)
    run = open_run(run_path)
    recipe = read_recipe(run)
    sources = {source.name: source for source in open_sources(recipe)}
    parts = {
        f"{name}/{index}": Part(source, index, start, min(start + span, source.held_out.episodes[index].length - 1))
        for name, source in sources.items()
        for index in _choose(source, episodes, start)
    }
    tokenizer, provenance = load_tokenizer(run, recipe, checkpoint)
    folder = output_folder(run, NAME, out)
    steps = steps or recipe.flow.sampler_steps
    settings = {"episodes": episodes, "points": points, "start": start, "span": span, "steps": steps}
    trials = crew.trials(folder, NAME, identity(tokenizer, list(sources.values()), settings))
    moving = cache(lambda name: reference(sources[name].train).moving.to(tokenizer.device))

    def measure(part: Part) -> Scores:
        frames = load(part.source.held_out, part.episode, range(part.start, part.goal + 1)).to(tokenizer.device)
        count = min(points, len(frames))
        at = [round(i * (len(frames) - 1) / (count - 1)) for i in range(count)]
        line = Line(tokenizer, frames, at, part.source.held_out.episodes[part.episode].start + part.start, steps)
        strip, gif = (folder / file for file in part.files)
        line.draw(strip, gif, [f"frame {part.start + t}" for t in at])
        return line.scores(moving(part.source.name))

    result: Result

    def tell(done: dict[str, Scores]) -> None:
        nonlocal result
        bar.update(watched, completed=len(done))
        there = [parts[name] for name in done]
        rows = [
            _row(name, kind, values)
            for name in sources
            for kind in KINDS
            if (values := [scores[kind] for key, scores in done.items() if parts[key].source.name == name])
        ]
        figures = [
            Figure(part.files[gif], f"{part}: {LINE} {'beside' if gif else 'above'} the real frames")
            for gif in (0, 1)
            for part in there
        ]
        result = Result(
            NAME, "Interpolation of states", _ABOUT, _COLUMNS, rows, settings, provenance, [], figures,
            by=["source", "image"], better=dict.fromkeys(("psnr", "psnr_moving", "spearman"), "higher"),
            partial=partial(len(done), len(parts), "episodes"),
        )  # fmt: skip
        if crew.main:
            result.write(folder)

    with progress(console) as bar:
        watched = bar.add_task("episodes", total=len(parts))
        crew.rounds(trials, parts, measure, tell)
    trials.close()
    result.show(console, folder)
    return result


@dataclass(frozen=True)
class Part:
    """A line between two frames of a held-out episode."""

    source: Source
    episode: int
    start: int
    goal: int

    @property
    def files(self) -> tuple[str, str]:
        """The strip and the loop."""
        stem = file_name(f"{self.source.name}_{self.episode}")
        return f"{stem}.png", f"{stem}.gif"

    def __str__(self) -> str:
        episode = self.source.held_out.episodes[self.episode].id
        return f"{self.source.name}, {episode}, frames {self.start} to {self.goal}"


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

    def scores(self, moving: Tensor) -> Scores:
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
