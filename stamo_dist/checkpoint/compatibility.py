"""A fingerprint of everything that decides a run's training, by recipe field, so that errors can name changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stamo_dist.data.mixture import GROUPS, LANES, Mixture
from stamo_dist.errors import RunError
from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.recipe.data import Data
from stamo_dist.recipe.schema import Recipe

_LISTED = 8
_STATISTICS = "model.statistics."
_FROZEN = "model.frozen."
_BATCH = "train.global_batch"
MAY_CHANGE_DATA, _MODEL = "--allow-changed-data", "--allow-changed-model"
#: Fields that the first checkpoints lack, and their values for such checkpoints.
_YOUNGER = {"model.compressor.noise": 0.0, "model.compressor.whiten": False, "model.encoder.output": "patches"}


@dataclass(frozen=True)
class RunFingerprint:
    """Recipe field → value of everything that decides what a step computes, except the optimizer's schedule.

    `mixture` is the fingerprint of the mixture, which changes whenever any batch would; a change of data `fields`
    counts only if it changes. `mixture_with`: the same with other weights by source, and another global batch.
    """

    mixture: str
    fields: Mapping[str, Any]
    mixture_with: Callable[[Mapping[str, Any], Any], str] | None = None

    def with_frozen(self, frozen: Mapping[str, str]) -> RunFingerprint:
        """A copy with the fingerprints of the frozen parts, known once they are loaded."""
        named = {f"{_FROZEN}{name}": fingerprint[:12] for name, fingerprint in frozen.items()}
        return replace(self, fields={**self.fields, **named})

    def check(
        self, saved_fingerprint: str, saved: Mapping[str, Any], where: str, allowed: frozenset[str], samples: int
    ) -> None:
        """Compare with the fingerprint of a checkpoint after `samples`.

        Global batch and weights may change at later steps; `allowed`: flags of the command line that permit more.

        Raises:
            RunError: Another stage, model or mixture; the message names every field that changed.
        """
        changed = {k for k in (*self.fields, *saved) if self.fields.get(k) != saved.get(k)}
        changed = {k for k in changed if k in self.fields or not k.startswith(_STATISTICS)}  # older: of videos too
        if not any(k.startswith(_FROZEN) for k in self.fields):
            changed = {k for k in changed if not k.startswith(_FROZEN)}
        if "stage" in changed:
            raise RunError(
                f"{where}: is a checkpoint of the {saved.get('stage')} stage, the recipe trains the "
                f"{self.fields['stage']} stage; give it a run_dir of its own"
            )
        model = {k for k in changed if k.startswith("model.")}
        data = changed - model
        other = saved_fingerprint != self.mixture and not self._same_until(samples, saved_fingerprint, saved)
        if other and MAY_CHANGE_DATA not in allowed:
            batch = BatchSizes.of(saved.get(_BATCH, 1)).batches(samples)
            later = f"; global batch and weights may change after step {batch}, counting the batches that were read"
            later = later if data & self._planned.keys() else ""
            self._refuse(where, "another mixture", data, saved, f"{MAY_CHANGE_DATA}{later}")
        if model and _MODEL not in allowed:
            self._refuse(where, "another model", model, saved, _MODEL)

    def _same_until(self, samples: int, saved_fingerprint: str, saved: Mapping[str, Any]) -> bool:
        """Whether the first `samples` are the same, and only later weights and global batches are others."""
        planned = self._planned
        if self.mixture_with is None or not planned.keys() <= saved.keys():
            return False
        batch = BatchSizes.of(saved[_BATCH]).batches(samples)
        if any(_until(batch, self.fields[field]) != _until(batch, saved[field]) for field in planned):
            return False
        weights = {source: saved[field] for field, source in planned.items() if source}
        return self.mixture_with(weights, saved[_BATCH]) == saved_fingerprint

    @property
    def _planned(self) -> dict[str, str]:
        """The fields that may change at given steps, and of weights the source."""
        return {_BATCH: "", **{f"data.sources.{name}.weight": name for name in sources_of(self.fields)}}

    def _refuse(self, where: str, what: str, changed: set[str], saved: Mapping[str, Any], flag: str) -> None:
        lines = [f"{k}: {_short(saved.get(k))} → {_short(self.fields.get(k))}" for k in sorted(changed)]
        more = [f"… and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        listed = "".join(f"\n  - {line}" for line in [*lines[:_LISTED], *more])
        raise RunError(
            f"{where}: was trained on {what}:{listed}\nrestore the recipe, choose another run_dir, or pass {flag}"
        )


def run_fingerprint(recipe: Recipe, mixture: Mixture) -> RunFingerprint:
    """The fingerprint of a recipe and its shards. Paths are not part of it: data and weights may move."""
    data = mixture.data
    places = {part: {"weights"} for part in ("encoder", "decoder", "vae")}
    fields: dict[str, Any] = {
        "stage": recipe.stage,
        "seed": recipe.seed,
        _BATCH: recipe.train.batches.plain,
        "data.temperature": data.temperature,
        "data.horizon": data.horizon,
        **_flat("data.shuffle", data.shuffle.model_dump(include=LANES if data.shuffle.in_lanes else GROUPS)),
        **_flat("model", recipe.model.model_dump(exclude=places)),
    }
    if recipe.stage == "policy":
        fields |= _flat("model.policy", recipe.policy.model_dump(exclude={"weights", "tokenizer", "targets"}))
    if data.views > 1:
        fields["data.views"] = data.views
    for number, (name, source) in enumerate(data.used.items()):
        content, shards = hashlib.sha256(), mixture.shards_of(number)
        for part in shards.contents():
            content.update("".join(f"{digest} {samples}\n" for digest, samples in part).encode())
        fields |= {
            f"data.sources.{name}.weight": source.weight,
            f"data.sources.{name}.max_epochs": source.max_epochs,
            f"data.sources.{name}.horizon": source.horizon,
            f"data.sources.{name}.actions": source.actions,
            f"data.sources.{name}.shards": f"{len(shards)} shards, {mixture.frames[number]} frames, "
            f"{content.hexdigest()[:12]}",
        }
        if any(grown := [len(folder.manifest.before) for folder in mixture.opened[number]]):
            fields[f"data.sources.{name}.grown"] = grown
        if source.labelled < 1:
            fields[f"data.sources.{name}.labelled"] = source.labelled
        if (
            recipe.stage == "policy" and source.actions
        ):  # they decide the meaning of an action, so they are kept with the weights
            fields[f"{_STATISTICS}{name}"] = [
                {column: stats.model_dump() for column, stats in folder.manifest.stats.items()}
                for folder in mixture.opened[number]
            ]
    fields = {name: value for name, value in fields.items() if name not in _YOUNGER or value != _YOUNGER[name]}
    return RunFingerprint(mixture.fingerprint, json.loads(json.dumps(fields)), mixture.fingerprint_with)


def sources_of(fields: Mapping[str, Any]) -> list[str]:
    """Names of the sources, in the recipe's order."""
    return [k.split(".")[2] for k in fields if k.startswith("data.sources.") and k.endswith(".shards")]


def growth_of(fields: Mapping[str, Any]) -> dict[str, list[int]]:
    """Source → for each of its paths, how many times it had grown; sources that never grew may be missing."""
    return {name: fields.get(f"data.sources.{name}.grown", [0]) for name in sources_of(fields)}


def mixture_of(recipe: Recipe, fields: Mapping[str, Any]) -> Mixture:
    """The mixture that a checkpoint with these fields was trained on, if its sources have grown since.

    Raises:
        DataError: All problems of all sources at once.
    """
    data = in_order(recipe.data, order_of(fields))
    return Mixture(data, seed=recipe.seed, global_batch=recipe.train.global_batch, growth=growth_of(fields))


def order_of(fields: Mapping[str, Any]) -> str | None:
    """`data.shuffle.order` of a checkpoint's run, also if an earlier version did not record it; None without one."""
    return fields.get("data.shuffle.order", "groups") if "data.shuffle.enabled" in fields else None


def in_order(data: Data, order: str | None) -> Data:
    """A recipe's data with the sample order of groups, for a run that began with it."""
    if order != "groups" or not data.shuffle.in_lanes:
        return data
    return data.model_copy(update={"shuffle": data.shuffle.model_copy(update={"order": order})})


def _until(batch: int, planned: Any) -> dict[int, Any]:
    """Step → value of a field that may change at given steps, for the steps before `batch`."""
    steps = planned if isinstance(planned, dict) else {0: planned}
    return {int(at): value for at, value in steps.items() if int(at) < batch}


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: v for key, child in value.items() for name, v in _flat(f"{prefix}.{key}", child).items()}


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
