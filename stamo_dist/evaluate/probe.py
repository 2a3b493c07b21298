"""Probing: how well a small head reads the robot's actions from the motion between two frames (STAMO §2.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from stamo_dist.data.frames import Episodes
from stamo_dist.errors import DataError
from stamo_dist.evaluate import heads
from stamo_dist.evaluate.common import (
    Figure,
    Provenance,
    Result,
    load_tokenizer,
    output_folder,
    progress,
    read_recipe,
)
from stamo_dist.evaluate.crew import Crew
from stamo_dist.evaluate.features import (
    REPRESENTATIONS,
    STATE,
    FeatureCache,
    Representations,
    pairs,
    standardising_frames,
)
from stamo_dist.evaluate.figures import file_name, save_lines
from stamo_dist.evaluate.held_out import SPLIT, Source, open_sources, spread
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import open_run

NAME = "probe"
NOTHING = "mean action"
_ABOUT = (
    "A head predicts the k actions between two frames from their difference in one representation, which stays frozen: "
    "mean squared error on held-out episodes, first camera; lower is better. The head learns on episodes of the "
    "training split; actions are standardised per dimension by them, dimensions that never change are left out, and "
    "1 is about what the mean action scores. ± is the deviation over the seeds of the head. pixel difference: frames "
    "averaged over a grid of cells, as many numbers as the state unless --pixels says otherwise; Δencoder: the patch "
    "tokens in front of the compressor; random encoder: the same networks before any training. "
)


def probe(
    run_path: Path,
    *,
    checkpoint: str | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    seeds: int = 3,
    episodes: int = 256,
    epochs: int = 60,
    patch_dim: int = 4096,
    pixels: int | None = None,
    batch: int = 64,
    kinds: Sequence[str] = heads.KINDS,
    representations: Sequence[str] = REPRESENTATIONS,
    keep_features: bool = True,
    out: Path | None = None,
    console: Console | None = None,
    crew: Crew = Crew(),  # noqa: B008 (frozen)
) -> Result:
    """Probe a run's tokenizer on every source that has actions and write RUN/eval/probe/.

    `ks`: frames between the two. `seeds`: heads of each kind. `episodes`: at most so many of each split, evenly spaced.
    `epochs`: at most so many for a head. `patch_dim`: at most so many numbers of patch tokens. `pixels`: cells on a
    side of the pixel difference. `batch`: frames encoded at once. `kinds`, `representations`: which heads and motions.
    Features are kept in RUN/eval/features/ unless `keep_features` is false; started again after a kill it goes on, and
    what is there is marked partial until then.

    Raises:
        StamoError: No such run, no checkpoint yet, a source without a held-out split, no source with actions, or
            episodes too short or too few; nothing was written.
    """
    console = crew.console(console)
    run = open_run(run_path)
    recipe = read_recipe(run)
    sources = probed(open_sources(recipe), max(ks))
    tokenizer, provenance = load_tokenizer(run, recipe, checkpoint)
    folder = output_folder(run, NAME, out)
    represent = Representations(
        tokenizer, standardising_frames({s.name: s.train for s in sources}), patch_dim=patch_dim, pixels=pixels
    )
    features = FeatureCache(run.evaluations / "features" if keep_features else None, represent, batch)
    settings = {
        "k": list(ks), "seeds": seeds, "episodes": episodes, "epochs": epochs, "patch_dim": patch_dim,
        "pixels": represent.grid, "tokenizer": represent.key["tokenizer"],
    }  # fmt: skip
    splits = {s.name: (spread(episodes, len(s.train)), spread(episodes, len(s.held_out))) for s in sources}
    checksums = [s.train.manifest.checksums for s in sources]
    identity = {**settings, "data": checksums, "features": represent.key}
    trials = crew.trials(folder, NAME, identity)

    found: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    dims: dict[str, int] = {}
    notes = _about_encoder(recipe)
    total = len(sources) * len(ks)
    with progress(console) as bar:
        for source in sources:
            train, test = splits[source.name]
            watched = bar.add_task(f"{source.name}: features", total=len(train) + len(test))
            episodes_of = [(split, part, e) for split, part, ones in _parts(source, recipe, train, test) for e in ones]

            def compute(one: tuple[str, Episodes, int]) -> dict[str, int]:
                rows = features.episode(one[1], one[0], one[2])
                bar.advance(watched)  # noqa: B023
                return {name: part.shape[1] for name, part in rows.items()}

            dims = crew.share(episodes_of, compute)[-1]
        result = None
        for done, (source, k) in enumerate(((s, k) for s in sources for k in ks), 1):
            data = SourceData(source, recipe, features, *splits[source.name])
            watched = bar.add_task(f"{source.name}, k = {k}", total=len(representations) * len(kinds) * seeds)
            targets, tests = data.targets(k)
            key = (source.name, "–", NOTHING)
            found.setdefault(key, {})[k] = [tests.square().mean().item()]
            inputs = {name: data.inputs(k, name) for name in representations}
            wanted = [(name, kind, seed) for name in representations for kind in kinds for seed in range(seeds)]

            def measure(part: tuple[str, str, int]) -> float:
                name, kind, seed = part
                x, test_x, episode = inputs[name]  # noqa: B023

                def fit() -> float:
                    head = heads.fit(kind, x, targets, episode, seed=seed, epochs=epochs)  # noqa: B023
                    return heads.error(head, test_x, tests)  # noqa: B023

                score: float = trials.get(f"{source.name}/{k}/{name}/{kind}/{seed}", fit)  # noqa: B023
                bar.advance(watched)  # noqa: B023
                return score

            for (name, kind, _), score in zip(wanted, crew.share(wanted, measure), strict=True):
                found.setdefault((source.name, kind, name), {}).setdefault(k, []).append(score)
            if not data.varies.all():
                left_out = [i for i, v in enumerate(data.varies.tolist()) if not v]
                note = f"{source.name}: action dimensions {left_out} never change and are left out"
                notes += [note] if note not in notes else []
            result = _result(found, dims, ks, notes, settings, provenance)
            result.partial = None if done == total else f"{done} of {total} pairs of a source and a k are measured"
            if crew.main:
                result.figures = _draw(result, ks, folder)
                result.write(folder)
    assert result is not None
    crew.wait()
    trials.close()
    result.show(console, folder)
    return result


def probed(sources: Sequence[Source], k: int) -> list[Source]:
    """The sources that have actions.

    Raises:
        DataError: None has, or one has no two training episodes or no held-out one with k + 1 frames.
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


def _parts(
    source: Source, recipe: Recipe, train: list[int], test: list[int]
) -> tuple[tuple[str, Episodes, list[int]], tuple[str, Episodes, list[int]]]:
    return (recipe.data.sources[source.name].split, source.train, train), (SPLIT, source.held_out, test)


class SourceData:
    """Motions and standardised actions of one source: training and held-out, by k and representation."""

    def __init__(self, source: Source, recipe: Recipe, features: FeatureCache, train: list[int], test: list[int]):
        self._parts = _parts(source, recipe, train, test)
        self._cached = cache(lambda split, e: features.episode(dict(self._by_split)[split], split, e))
        self._by_split = [(split, part) for split, part, _ in self._parts]
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
        for split, part, chosen in self._parts:
            long = [e for e in chosen if part.episodes[e].length > k]
            found.append(pairs(lambda e, split=split: self._cached(split, e), long, k, name))  # type: ignore[misc]
        return found[0][0], found[1][0], found[0][1]


def _result(
    found: Mapping[tuple[str, str, str], Mapping[int, list[float]]], dims: Mapping[str, int], ks: Sequence[int],
    notes: list[str], settings: dict[str, Any], provenance: Provenance,
) -> Result:  # fmt: skip
    columns = {"source": "source", "head": "head", "representation": "motion as", "dim": "numbers"}
    for k in ks:
        columns |= {f"mse_{k}": f"k = {k}", f"spread_{k}": "±"}
    rows: list[dict[str, Any]] = []
    order = {name: i for i, name in enumerate(dict.fromkeys(source for source, _, _ in found))}
    kinds = ("–", *heads.KINDS)
    for source, kind, name in sorted(found, key=lambda key: (order[key[0]], kinds.index(key[1]))):
        row: dict[str, Any] = {"source": source, "head": kind, "representation": name, "dim": dims.get(name)}
        for k in ks:
            scores = found[source, kind, name].get(k)
            row[f"mse_{k}"] = fmean(scores) if scores else None
            row[f"spread_{k}"] = stdev(scores) if scores and len(scores) > 1 else None
        rows.append(row)
    better = dict.fromkeys((f"mse_{k}" for k in ks), "lower")
    return Result(
        NAME, "Actions read from motions", _ABOUT + heads.RULE, columns, rows, settings, provenance,
        [*notes, *_compare(rows, ks)], by=["source", "head", "representation"], better=better,
    )  # fmt: skip


def _compare(rows: Sequence[Mapping[str, Any]], ks: Sequence[int]) -> list[str]:
    """Where the state is the best motion, and where it is not."""
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


def _draw(result: Result, ks: Sequence[int], folder: Path) -> list[Figure]:
    """One picture a source: the MLP's error over k, a line a representation."""
    figures = []
    for source in dict.fromkeys(row["source"] for row in result.rows):
        lines = {
            row["representation"]: [row[f"mse_{k}"] for k in ks]
            for row in result.rows
            if row["source"] == source and row["head"] in ("–", heads.MLP)
        }
        file = file_name(source, "png")
        save_lines(folder / file, ks, lines, x="k, frames between", y="mean squared error", strong=STATE)
        figures.append(Figure(file, f"{source}: error of the MLP head on held-out episodes"))
    return figures
