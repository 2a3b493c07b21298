"""Probing: how well a small head predicts the robot's actions from the motion between two frames (STAMO §2.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from stamo_dist.data.frames import Episodes
from stamo_dist.errors import DataError
from stamo_dist.evaluate import heads
from stamo_dist.evaluate.features import (
    REPRESENTATIONS,
    STATE,
    FeatureCache,
    Representations,
    pairs,
    standardising_frames,
)
from stamo_dist.evaluate.figures import file_name, save_lines
from stamo_dist.evaluate.held_out import SPLIT, HeldOutSource, spread
from stamo_dist.evaluate.measurement import TokenizerMeasurement, how_much
from stamo_dist.evaluate.options import ProbeOptions
from stamo_dist.evaluate.result import EvaluationResult, Figure
from stamo_dist.evaluate.workers import PartsFile
from stamo_dist.recipe.schema import Recipe

NOTHING = "mean action"


class ActionProbe(ProbeOptions, TokenizerMeasurement):
    """Heads for every source with actions, on every motion; features are cached in RUN/eval/features/."""

    name = "probe"
    title = "Actions read from motions"
    about = (
        "A head predicts the k actions between two frames from their difference in one representation, which stays "
        "frozen: mean squared error on held-out episodes, first camera; lower is better. The head learns on episodes "
        "of the training split; actions are standardised per dimension by them, dimensions that never change are left "
        "out, and 1 is about what the mean action scores. ± is the deviation over the seeds of the head. pixel "
        "difference: frames averaged over a grid of cells, as many numbers as the state unless --pixels says "
        "otherwise; Δencoder: the patch tokens in front of the compressor; random encoder: the same networks before "
        f"any training. {heads.RULE}"
    )
    by = ("source", "head", "representation")
    unrecorded = ("batch",)

    kinds: Sequence[str] = heads.KINDS
    representations: Sequence[str] = REPRESENTATIONS
    keep_features = True

    def select(self) -> None:
        self.ks = sorted(set(self.k or (1, 2, 4, 8)))
        self.sources = {source.name: source for source in probed(list(self.sources.values()), max(self.ks))}
        self._found: dict[tuple[str, str, str], dict[int, list[float]]] = {}  # source, head, motion → k → errors
        self._dims: dict[str, int] = {}

    @cached_property
    def represent(self) -> Representations:
        frames = standardising_frames({name: source.train for name, source in self.sources.items()})
        return Representations(self.tokenizer, frames, patch_dim=self.patch_dim, pixels=self.pixels)

    def settings(self) -> dict[str, Any]:
        key = self.represent.key
        return {**super().settings(), "k": self.ks, "pixels": self.represent.grid, "tokenizer": key["tokenizer"]}

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "features": self.represent.key}

    def results(self) -> Iterator[EvaluationResult]:
        folder = self.run_folder.evaluations / "features" if self.keep_features else None
        features = FeatureCache(folder, self.represent, self.batch)
        finished = self.group.open_parts(self.folder / f"{self.name}.parts.jsonl", self.identity())
        notes = _about_encoder(self.recipe)
        for source in self.sources.values():
            self._compute_features(source, features)
        wanted = [(source, k) for source in self.sources.values() for k in self.ks]
        for done, (source, k) in enumerate(wanted, 1):
            data = SourceData(source, self.recipe, features, self.episodes)
            self._fit_heads(data, k, finished)
            if not data.varies.all():
                left_out = [i for i, v in enumerate(data.varies.tolist()) if not v]
                note = f"{source.name}: action dimensions {left_out} never change and are left out"
                notes += [note] if note not in notes else []
            yield self._result(notes, how_much(done, len(wanted), "pairs of a source and a k"))
        finished.close()

    def _compute_features(self, source: HeldOutSource, features: FeatureCache) -> None:
        parts = split_episodes(source, self.recipe, self.episodes)
        episodes = [(split, part, e) for split, part, chosen in parts for e in chosen]
        watched = self.bar.add_task(f"{source.name}: features", total=len(episodes))

        def compute(one: tuple[str, Episodes, int]) -> dict[str, int]:
            rows = features.episode(one[1], one[0], one[2])
            self.bar.advance(watched)
            return {name: part.shape[1] for name, part in rows.items()}

        self._dims = self.group.share(episodes, compute)[-1]

    def _fit_heads(self, data: SourceData, k: int, finished: PartsFile) -> None:
        """Add the errors of one source and one k to the results."""
        targets, tests = data.targets(k)
        inputs = {name: data.inputs(k, name) for name in self.representations}
        wanted = {
            f"{data.name}/{k}/{name}/{kind}/{seed}": (name, kind, seed)
            for name in self.representations
            for kind in self.kinds
            for seed in range(self.seeds)
        }
        watched = self.bar.add_task(f"{data.name}, k = {k}", total=len(wanted))

        def fit(head: tuple[str, str, int]) -> float:
            name, kind, seed = head
            x, test_x, episode = inputs[name]
            return heads.error(heads.fit(kind, x, targets, episode, seed=seed, epochs=self.epochs), test_x, tests)

        errors: Mapping[str, float] = {}
        for errors in self.group.map(finished, wanted, fit):
            self.bar.update(watched, completed=len(errors))
        self._found.setdefault((data.name, "–", NOTHING), {})[k] = [tests.square().mean().item()]
        for key, (name, kind, _) in wanted.items():
            self._found.setdefault((data.name, kind, name), {}).setdefault(k, []).append(errors[key])

    def _result(self, notes: Sequence[str], partial: str | None) -> EvaluationResult:
        columns = {"source": "source", "head": "head", "representation": "motion as", "dim": "numbers"}
        for k in self.ks:
            columns |= {f"mse_{k}": f"k = {k}", f"spread_{k}": "±"}
        rows = self._rows()
        figures = self._draw(rows) if self.group.main else []
        notes = [*notes, *_compare(rows, self.ks)]
        better = dict.fromkeys((f"mse_{k}" for k in self.ks), "lower")
        return self.result(rows, columns=columns, better=better, figures=figures, notes=notes, partial=partial)

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        order, kinds = list(self.sources), ("–", *heads.KINDS)
        for source, kind, name in sorted(self._found, key=lambda key: (order.index(key[0]), kinds.index(key[1]))):
            row: dict[str, Any] = {"source": source, "head": kind, "representation": name, "dim": self._dims.get(name)}
            for k in self.ks:
                scores = self._found[source, kind, name].get(k)
                row[f"mse_{k}"] = fmean(scores) if scores else None
                row[f"spread_{k}"] = stdev(scores) if scores and len(scores) > 1 else None
            rows.append(row)
        return rows

    def _draw(self, rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
        """One figure per source: the MLP's error over k, one line per representation."""
        figures = []
        for source in dict.fromkeys(row["source"] for row in rows):
            lines = {
                row["representation"]: [row[f"mse_{k}"] for k in self.ks]
                for row in rows
                if row["source"] == source and row["head"] in ("–", heads.MLP)
            }
            file = file_name(source, "png")
            save_lines(self.folder / file, self.ks, lines, x="k, frames between", y="mean squared error", strong=STATE)
            figures.append(Figure(file, f"{source}: error of the MLP head on held-out episodes"))
        return figures


def probed(sources: Sequence[HeldOutSource], k: int) -> list[HeldOutSource]:
    """The sources that have actions.

    Raises:
        DataError: None has actions, or one lacks two training episodes or a held-out one with k + 1 frames.
    """
    with_actions = [s for s in sources if s.train.manifest.action_dim]
    problems = []
    if not with_actions:
        problems.append(f"no source has actions ({', '.join(s.name for s in sources)}): there is nothing to predict")
    for source in with_actions:
        for what, part, least in (("training", source.train, 2), ("held-out", source.held_out, 1)):
            lengths = [episode.length for episode in part.episodes]
            if sum(length > k for length in lengths) < least:
                problems.append(
                    f"data.sources.{source.name}: k = {k} needs {least} {what} episode(s) of {k + 1} frames or more, "
                    f"the longest has {max(lengths, default=0)}; choose a smaller --k or convert more episodes"
                )
    if problems:
        raise DataError("\n".join(problems))
    return with_actions


def split_episodes(source: HeldOutSource, recipe: Recipe, most: int) -> list[tuple[str, Episodes, list[int]]]:
    """At most this many evenly spaced episodes of the training split and of the held-out one."""
    splits = ((recipe.data.sources[source.name].split, source.train), (SPLIT, source.held_out))
    return [(split, part, spread(most, len(part))) for split, part in splits]


class SourceData:
    """Motions and standardised actions of one source: training and held-out, by k and representation."""

    def __init__(self, source: HeldOutSource, recipe: Recipe, features: FeatureCache, episodes: int):
        self.name = source.name
        self._parts = split_episodes(source, recipe, episodes)
        self._features = [cache(partial(features.episode, part, split)) for split, part, _ in self._parts]
        self._actions = [[torch.as_tensor(part.actions(e)) for e in chosen] for _, part, chosen in self._parts]
        scale = heads.Scale.of(torch.cat(self._actions[0]))
        self.scale, self.varies = scale, scale.varies

    def targets(self, k: int) -> tuple[Tensor, Tensor]:
        """The k actions from each frame on, in standard units, (n, k · varying dimensions): training, held-out."""
        train, test = (
            torch.cat(
                [self.scale(a)[:, self.varies].unfold(0, k, 1)[: len(a) - k].flatten(1) for a in part if len(a) > k]
            )
            for part in self._actions
        )
        return train, test

    def inputs(self, k: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Motions (n, d): training, held-out; and the episode of each training one."""
        found = []
        for (_, part, chosen), features in zip(self._parts, self._features, strict=True):
            found.append(pairs(features, [e for e in chosen if part.episodes[e].length > k], k, name))
        return found[0][0], found[1][0], found[0][1]


def _compare(rows: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> list[str]:
    """Notes on which sources the state is the best motion for, and on which not."""
    notes = []
    for source, head in dict.fromkeys((r["source"], r["head"]) for r in rows if r["head"] != "–"):
        group = {r["representation"]: r for r in rows if (r["source"], r["head"]) == (source, head)}
        said = []
        for k in ks:
            scores = {name: row[f"mse_{k}"] for name, row in group.items()}
            if scores[STATE] is None:
                continue
            lower = sorted((score, name) for name, score in scores.items() if score < scores[STATE])
            said.append(
                f"k = {k} behind "
                + ", ".join(f"{name} ({score:.3f})" for score, name in lower)
                + f" at {scores[STATE]:.3f}"
                if lower
                else f"k = {k} lowest at {scores[STATE]:.3f}"
            )
        notes.append(f"{source}, {head} head, {STATE}: " + "; ".join(said))
    return notes


def _about_encoder(recipe: Recipe) -> list[str]:
    encoder = recipe.model.encoder
    if encoder.weights and not encoder.train:
        return [f"Δencoder: the frozen weights {encoder.weights}"]
    begun = f"the weights {encoder.weights}" if encoder.weights else "random weights"
    return [f"Δencoder: not a frozen DINOv2, but an encoder that was trained with the tokenizer from {begun}"]
