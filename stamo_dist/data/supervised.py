"""Counting a policy's samples with an action loss and with a world loss, from the episode tables alone.

Needs no torch and opens no shard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.allocation import allocation_of
from stamo_dist.data.episode_columns import EpisodeColumns
from stamo_dist.data.schema import Manifest
from stamo_dist.recipe.data import Data, SourceConfig
from stamo_dist.recipe.schema import Recipe

#: A folder of a source, and its split's episodes.
Table = tuple[Manifest, EpisodeColumns]


def labelled_episodes(episodes: int, share: float) -> NDArray[np.bool_]:
    """bool (episodes,): episodes whose actions are used; every fifth one for 0.2, the same ones in every run."""
    exact = Fraction(str(share))
    fits = episodes * exact.numerator < 1 << 63
    numbers = np.arange(episodes + 1, dtype=np.int64 if fits else object) * exact.numerator // exact.denominator
    return np.asarray(np.diff(numbers) > 0, bool)


def sample_streams(data: Data, source: SourceConfig, manifest: Manifest) -> int:
    """Number of a folder's cameras that form separate sample streams."""
    if data.views > 1:
        return 1
    return len(dict.fromkeys(manifest.cameras if source.cameras is None else source.cameras))


def without_actions(data: Data, manifests: Mapping[str, Sequence[Manifest]]) -> list[str]:
    """A line naming the sources that give a policy no actions, and why; [] if all give some."""
    why = {
        name: "actions: false" if not data.sources[name].actions else "its shards have none"
        for name, folders in manifests.items()
        if folders and not (data.sources[name].actions and any(manifest.action_dim for manifest in folders))
    }
    return [f"no actions from: {', '.join(f'{name} ({reason})' for name, reason in why.items())}"] if why else []


@dataclass(frozen=True)
class Supervised:
    """Sample counts of one source, over the cameras used.

    `action`: samples whose episode is labelled and continues for a whole chunk. `world`: those whose episode has the
    frame to predict. `longest`: frames of the longest episode; `longest_labelled`: of the longest labelled one, 0
    without any.
    """

    name: str
    acts: bool
    horizon: int  # frames from t to the target frame
    episodes: int
    largest: int  # episodes of its largest folder: labelled episodes are chosen per folder
    samples: int
    action: int
    world: int
    longest: int
    longest_labelled: int

    def share(self, loss: str) -> float:
        """Fraction of its samples with the loss "action" or "world"."""
        return getattr(self, loss) / self.samples


class Supervision:
    """The supervision of a policy's run.

    Args:
        recipe: A policy's recipe.
        tables: Of every source in use, in the recipe's order.

    Attributes:
        sources: One for each.
        world: Name of the second loss, None if the policy has none.
    """

    def __init__(self, recipe: Recipe, tables: Mapping[str, Sequence[Table]]):
        policy, data = recipe.policy, recipe.data
        pseudo = policy.diffusion is not None and policy.diffusion.pseudo != "none"
        self.world = "world" if policy.world is not None else "pseudo-action" if pseudo else None
        each = pseudo and policy.diffusion is not None and policy.diffusion.pseudo_per == "step"
        self.sources = [_count(data, name, tables[name], each=each) for name in data.used]
        self._data = data
        self._silent = without_actions(data, {name: [manifest for manifest, _ in tables[name]] for name in data.used})
        schedule = allocation_of(data, [source.samples for source in self.sources], recipe.train.batches)
        self._read = schedule.counts(recipe.train.samples).tolist()  # samples of each source in the run

    def share(self, loss: str) -> float:
        """Fraction of the run's samples with the loss "action" or "world"."""
        there = (n * s.share(loss) for n, s in zip(self._read, self.sources, strict=True))
        return sum(there) / max(1, sum(self._read))

    @property
    def lines(self) -> list[str]:
        """The fractions, one line per loss, also by source; and the sources without actions."""
        losses = {"action": "action"} | ({"world": self.world} if self.world else {})
        shares = [
            f"{name} loss: {self.share(loss):.1%} of the samples"
            f" ({', '.join(f'{s.name} {s.share(loss):.1%}' for s in self.sources)})"
            for loss, name in losses.items()
        ]
        return [*shares, *self._silent]

    @property
    def problems(self) -> list[str]:
        """A line for each loss that no sample of the run has."""
        problems = []
        if not self.share("action"):
            why = "; ".join(self._no_action(s, n) for s, n in zip(self.sources, self._read, strict=True) if s.acts)
            why = why or "none of them has actions; a policy needs those of one at least"
            problems.append(f"data.sources: no sample has an action loss: {why}")
        if self.world and not self.share("world"):
            why = "; ".join(
                f"{s.name} is to predict {s.horizon} frames ahead, its longest episode has {s.longest} frames"
                for s in self.sources
            )
            longest = max(s.longest for s in self.sources)
            fix = f"set data.horizon: {longest - 1} or less" if longest > 1 else "give sources with longer episodes"
            problems.append(f"data.horizon: no sample has a {self.world} loss: {why}; {fix}")
        return problems

    def _no_action(self, source: Supervised, read: int) -> str:
        if not source.longest_labelled:
            enough = math.ceil(1e4 / source.largest) / 1e4
            labelled = self._data.sources[source.name].labelled
            return (
                f"data.sources.{source.name}.labelled: {labelled:g} of {source.episodes} episodes is not one; "
                f"set {enough:g} or more"
            )
        if not source.action:
            most = source.longest_labelled
            return (
                f"data.horizon: {self._data.horizon} actions, but the longest episode of {source.name} whose actions "
                f"are read has {most} frames; set data.horizon: {most} or less"
            )
        assert not read, "else it has some"
        return f"data.sources.{source.name}.weight: the run reads nothing of it; raise it"


def _count(data: Data, name: str, tables: Sequence[Table], *, each: bool) -> Supervised:
    """Count samples of a source. `each`: every step is a target, so a sample needs only one further frame."""
    source = data.sources[name]
    horizon = source.horizon or data.horizon
    samples = action = world = longest = longest_labelled = 0
    for manifest, episodes in tables:
        lengths = episodes.lengths
        labelled = (
            lengths[labelled_episodes(len(episodes), source.labelled)]
            if source.actions and manifest.action_dim
            else lengths[:0]
        )
        streams = sample_streams(data, source, manifest)
        samples += streams * int(lengths.sum())
        action += streams * int((labelled - data.horizon + 1).clip(0).sum())
        world += streams * int((lengths - (1 if each else horizon)).clip(0).sum())
        longest = max(longest, int(lengths.max(initial=0)))
        longest_labelled = max(longest_labelled, int(labelled.max(initial=0)))
    acts = source.actions and any(manifest.action_dim for manifest, _ in tables)
    counts = [len(episodes) for _, episodes in tables]
    return Supervised(name, acts, horizon, sum(counts), max(counts), samples, action, world, longest, longest_labelled)
