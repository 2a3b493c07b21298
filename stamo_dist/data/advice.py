"""Notes of `stamo recipe check` on a recipe with local shards; needs no torch and reads no frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stamo_dist.data.episode_columns import read_columns
from stamo_dist.data.schema import Manifest, read_manifest, scaling_notes
from stamo_dist.data.supervised import Supervision, Table, without_actions
from stamo_dist.errors import DataError, RecipeError
from stamo_dist.recipe.schema import Recipe


def advice(recipe: Recipe) -> list[str]:
    """Notes, one line each: samples per loss, dimensions with special scaling, and model outputs to cache.

    Remote or missing sources are skipped. Shares of the losses need all sources; sources without actions are listed
    among the local ones.

    Raises:
        RecipeError: No sample of a policy has one of its losses.
    """
    manifests = {
        name: [found for path in source.paths if (found := _manifest(path)) is not None]
        for name, source in recipe.data.used.items()
    }
    lines: list[str] = []
    if recipe.stage == "policy":
        shares = _supervised(recipe) or without_actions(recipe.data, manifests)
        lines = [*shares, *_scaling(recipe, manifests)]
    frames = sum(
        manifest.splits[recipe.data.sources[name].split].frames
        for name, folders in manifests.items()
        for manifest in folders
        if recipe.data.sources[name].split in manifest.splits
    )
    return lines + list(_caching(recipe, frames))


def _manifest(path: str) -> Manifest | None:
    if "://" in path:
        return None
    try:
        return read_manifest(Path(path).expanduser())
    except DataError:
        return None


def _supervised(recipe: Recipe) -> list[str]:
    tables: dict[str, list[Table]] = {}
    for name, source in recipe.data.used.items():
        for path in source.paths:
            manifest = _manifest(path)
            if manifest is None or source.split not in manifest.splits:
                return []
            try:
                episodes = read_columns(Path(path).expanduser(), source.split, manifest.splits[source.split].episodes)
            except DataError:
                return []
            if not len(episodes):
                return []
            tables.setdefault(name, []).append((manifest, episodes))
    supervision = Supervision(recipe, tables)
    if problems := supervision.problems:
        raise RecipeError(problems)
    return supervision.lines


def _scaling(recipe: Recipe, manifests: dict[str, list[Manifest]]) -> Iterator[str]:
    for name, folders in manifests.items():
        columns = ["action"] * recipe.data.sources[name].actions + ["proprio"] * recipe.policy.proprio
        for manifest in folders:
            for column in columns:
                if column in manifest.stats:
                    for note in scaling_notes(manifest, column, manifest.stats[column]):
                        yield f"data.sources.{name}: {note}"


def _caching(recipe: Recipe, frames: int) -> Iterator[str]:
    """Frozen models whose output `stamo encode` could cache, if every frame would be encoded more than once."""
    seen = recipe.train.samples
    if recipe.stage == "policy":
        policy = recipe.policy
        pseudo = policy.diffusion.pseudo if policy.diffusion is not None else "none"
        states = policy.vision == "stamo" and policy.stamo == "states" and policy.views == 1
        target = pseudo == "motion" or policy.world is not None
        if policy.targets == "cached" or policy.tokenizer is None or not (states or target):
            return
        if pseudo == "pixels" or (policy.world is not None and policy.world.target == "dinov2"):
            return  # these need frames, which the cache does not hold
        field, what, reads = "policy.targets", "the tokenizer's states", int(states) + int(target)
    else:
        if recipe.stage != "tokenizer" or recipe.data.latents == "cached" or recipe.data.horizon:
            return
        field, what, reads = "data.latents", "the VAE's latents", 1
    if not frames or reads * seen <= frames:
        return
    times = f"{what} of {frames:,} frames are computed {reads * seen / frames:.1f} times each"
    if recipe.data.augment.active:
        yield f"{field}: {times}; without data.augment `stamo encode` could do it once ({field}: cached)"
    else:
        yield f"{field}: {times}; `stamo encode` does it once: set {field}: cached"
