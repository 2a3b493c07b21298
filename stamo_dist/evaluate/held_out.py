"""Held-out frames of a run's sources, and the mean image and moving pixels of their training frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stamo_dist.checkpoint.select import growth_of_run
from stamo_dist.data.frames import Episodes
from stamo_dist.data.schema import Manifest
from stamo_dist.data.sources import open_source
from stamo_dist.errors import DataError
from stamo_dist.recipe.schema import Recipe

SPLIT = "val"
MOVING_SHARE = 0.1
_REFERENCE_EPISODES, _REFERENCE_FRAMES = 64, 512

MOVING_RULE = (
    f"Moving pixels are the {MOVING_SHARE:.0%} of a source's pixels that vary most within its training episodes "
    f"(variance over an episode's frames, averaged over the channels and over up to {_REFERENCE_EPISODES} episodes): "
    "one mask per source, made without the held-out frames."
)


@dataclass(frozen=True)
class Pick:
    """One frame: its episode in the split, its time, and its number in the split."""

    episode: int
    t: int
    sample: int


@dataclass(frozen=True)
class HeldOutSource:
    """The first camera of one source of a recipe."""

    name: str
    camera: str
    train: Episodes
    held_out: Episodes

    @cached_property
    def reference(self) -> Reference:
        return reference(self.train)

    def images(self, picks: Sequence[Pick]) -> Tensor:
        """uint8 (n, H, W, 3)."""
        return torch.cat([load(self.held_out, p.episode, [p.t]) for p in picks])


@dataclass(frozen=True)
class Reference:
    """Reference images, computed from training frames only."""

    mean: Tensor  # (3, H, W) float32 in [0, 1]
    moving: Tensor  # (H, W) bool


def open_sources(recipe: Recipe) -> list[HeldOutSource]:
    """Every source of the recipe (of several folders, the first), with its held-out split, in the state that the run in
    `run_dir` reads if the source has grown since.

    Raises:
        DataError: With every source that cannot be read or has no held-out split.
    """
    sources, problems = [], []
    growth = growth_of_run(Path(recipe.run_dir))
    for name, entry in recipe.data.used.items():
        try:
            path = entry.paths[0]
            grown = growth[name][0] if name in growth else None
            manifest = manifest_with(path, SPLIT, recipe.data.cache, grown)
            camera = (entry.cameras or manifest.cameras)[0]
            train, held_out = (
                Episodes(path, split, camera, cache=recipe.data.cache, growth=grown) for split in (entry.split, SPLIT)
            )
            sources.append(HeldOutSource(name, camera, train, held_out))
        except DataError as e:
            problems.append(f"data.sources.{name}: {e}")
    if problems:
        raise DataError("\n".join(problems))
    return sources


def manifest_with(path: str, split: str, cache: str, growth: int | None = None) -> Manifest:
    """The manifest of a source, which must have this split.

    Raises:
        DataError: It cannot be read, or the split has no frames.
    """
    manifest = open_source(path, cache, growth).manifest
    if split not in manifest.splits or not manifest.splits[split].frames:
        there = ", ".join(name for name, found in manifest.splits.items() if found.frames) or "none"
        fix = "convert it anew with a --val-fraction above 0" if split == SPLIT else "choose another --split"
        raise DataError(f"{path} has no {split!r} split (its splits: {there}); {fix}")
    return manifest


def load(episodes: Episodes, index: int, ts: Sequence[int]) -> Tensor:
    """Frames of one episode, uint8 (n, H, W, 3)."""
    return torch.as_tensor(episodes.frames(index, list(ts)))


def spread(count: int, of: int) -> list[int]:
    """`count` integers below `of`, the centres of `count` equal parts; all integers if `of` is less.

    >>> spread(3, 12)
    [2, 6, 10]
    """
    count = min(count, of)
    return [(2 * i + 1) * of // (2 * count) for i in range(count)]


def pick_frames(episodes: Episodes, frames: int) -> list[Pick]:
    """At most `frames` frames, evenly spaced in every episode; with more episodes, the middle frames of some."""
    chosen = spread(frames, len(episodes.episodes))
    picks = []
    for k, e in enumerate(chosen):
        episode = episodes.episodes[e]
        share = frames // len(chosen) + (k < frames % len(chosen))
        picks += [Pick(e, t, episode.start + t) for t in spread(share, episode.length)]
    return picks


def reference(episodes: Episodes) -> Reference:
    """Mean image and moving pixels from evenly spaced training frames; see MOVING_RULE."""
    chosen = spread(_REFERENCE_EPISODES, len(episodes.episodes))
    per_episode = _REFERENCE_FRAMES // len(chosen)
    total, variance, frames = torch.zeros(()), torch.zeros(()), 0
    for e in chosen:
        images = load(episodes, e, spread(per_episode, episodes.episodes[e].length)).to(torch.float64) / 255
        total = total + images.sum(0)
        variance = variance + images.var(0, unbiased=len(images) > 1)
        frames += len(images)
    deviation = (variance / len(chosen)).mean(-1).sqrt()
    moving = (deviation >= deviation.flatten().quantile(1 - MOVING_SHARE)) & (deviation > 0)
    return Reference((total / frames).permute(2, 0, 1).to(torch.float32), moving)
