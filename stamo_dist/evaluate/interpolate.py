"""Motion interpolation: decoding the straight line between two states of an episode, compared with the real frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stamo_dist.errors import DataError
from stamo_dist.evaluate.figures import cell_size, file_name, save_motion
from stamo_dist.evaluate.held_out import MOVING_RULE, SPLIT, HeldOutSource, load, spread
from stamo_dist.evaluate.measurement import PartwiseMeasurement, by_group
from stamo_dist.evaluate.metrics import order, psnr
from stamo_dist.evaluate.options import InterpolateOptions
from stamo_dist.evaluate.result import Figure
from stamo_dist.evaluate.weights import sampler_noise
from stamo_dist.models.images import to_float
from stamo_dist.models.tokenizer import Tokenizer

FADE, LINE, OWN = KINDS = ("cross-fade", "line of states", "own states")
Scores = dict[str, list[float]]  # image row → PSNR, PSNR over the moving pixels, rank correlation, share forward


@dataclass(frozen=True)
class LineSegment:
    """The frames `start` to `goal` of a held-out episode; the line connects their states."""

    source: HeldOutSource
    episode: int
    start: int
    goal: int

    @property
    def files(self) -> tuple[str, str]:
        """File names of the strip (PNG) and the loop (GIF)."""
        stem = file_name(f"{self.source.name}_{self.episode}")
        return f"{stem}.png", f"{stem}.gif"

    def __str__(self) -> str:
        episode = self.source.held_out.episodes[self.episode].id
        return f"{self.source.name}, {episode}, frames {self.start} to {self.goal}"


class Interpolation(InterpolateOptions, PartwiseMeasurement[LineSegment, Scores]):
    """Lines from frame `start` to `start + span`, or to the episode's last frame."""

    name = "interpolate"
    title = "Interpolation of states"
    about = (
        f"Split {SPLIT!r}, first camera: the straight line of states from one frame of an episode to a later one. PSNR "
        "of the pictures between the ends against the real frames at the same times, over all and over the moving "
        "pixels: for the decoded line, for a cross-fade of the two real ends (no model), and for each real frame's own "
        "state decoded (what the tokenizer can reach). The states of all real frames between (their pixels, for the "
        "cross-fade) are projected on the line: order is the rank correlation (Spearman) of the projection with time, "
        f"forward the share of steps that go forward. {MOVING_RULE}"
    )
    columns: ClassVar = {
        "source": "source",
        "image": "image",
        "episodes": "episodes",
        "psnr": "PSNR dB",
        "psnr_moving": "moving dB",
        "spearman": "order",
        "increasing": "forward",
    }
    by = ("source", "image")
    better: ClassVar = dict.fromkeys(("psnr", "psnr_moving", "spearman"), "higher")
    noun = "episodes"

    def select(self) -> None:
        self.parts = {
            f"{name}/{segment.episode}": segment
            for name, source in self.sources.items()
            for segment in self._segments(source)
        }

    def _segments(self, source: HeldOutSource) -> list[LineSegment]:
        """Segments of evenly spaced episodes among those with a frame between `start` and goal."""
        lengths = [episode.length for episode in source.held_out.episodes]
        possible = [i for i, length in enumerate(lengths) if length >= self.start + 3]
        if not possible:
            raise DataError(
                f"data.sources.{source.name}: the longest held-out episode has {max(lengths)} frames, a line from "
                f"frame {self.start} needs {self.start + 3}; choose an earlier --start or convert longer episodes"
            )
        chosen = [possible[i] for i in spread(self.episodes, len(possible))]
        return [LineSegment(source, i, self.start, min(self.start + self.span, lengths[i] - 1)) for i in chosen]

    def measure(self, part: LineSegment) -> Scores:
        held_out = part.source.held_out
        frames = load(held_out, part.episode, range(part.start, part.goal + 1)).to(self.tokenizer.device)
        count = min(self.points, len(frames))
        at = [round(i * (len(frames) - 1) / (count - 1)) for i in range(count)]
        sample = held_out.episodes[part.episode].start + part.start
        line = Line(self.tokenizer, frames, at, sample, self.sampler_steps)
        strip, gif = (self.folder / file for file in part.files)
        rows = {LINE: line.pictures[LINE], "real frames": line.truth}
        save_motion(strip, gif, rows, [f"frame {part.start + t}" for t in at], cell_size(self.recipe.data.image_size))
        return line.scores(part.source.reference.moving.to(self.tokenizer.device))

    def scores(self, done: Mapping[str, Scores]) -> dict[str, dict[str, list[list[float]]]]:
        return by_group(done, lambda name: self.parts[name].source.name, KINDS)

    def figures(self, done: Mapping[str, Scores]) -> list[Figure]:
        there = [self.parts[name] for name in done]
        return [
            Figure(part.files[gif], f"{part}: {LINE} {'beside' if gif else 'above'} the real frames")
            for gif in (0, 1)
            for part in there
        ]


class Line:
    """Images along one line, at the times `at` of uint8 frames (T, H, W, 3); all decoded from the same noise."""

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
        """Image row → PSNR, PSNR over the moving pixels (means over the images between the ends), and order scores."""
        truth = self.truth[1:-1]
        return {
            kind: [psnr(images[1:-1], truth, where).mean().item() for where in (None, moving)] + [*self.order[kind]]
            for kind, images in self.pictures.items()
        }
