"""`load` reads a recipe: what it extends and the overrides are merged, checked, and traced to their lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stamo_dist.errors import RecipeError
from stamo_dist.recipe.layers import merge
from stamo_dist.recipe.lines import dotted, dump_yaml, is_by_step
from stamo_dist.recipe.run_name import check_name
from stamo_dist.recipe.schema import Recipe
from stamo_dist.recipe.validate import validate


@dataclass(frozen=True)
class Loaded:
    """A valid recipe and the origin of its values."""

    path: Path
    text: str  # the file as written
    recipe: Recipe
    resolved: dict[str, Any]  # every value, defaults included, as plain YAML types
    provenance: dict[str, str]  # dotted field → "recipes/base/x.yaml:12" | "--set" | "default"


def load(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Loaded:
    """Read the recipe at `path`.

    Args:
        path: A YAML file, or a name of `stamo recipe list`. Names under its `extends` are relative to it; every other
            path in a recipe is relative to the working directory.
        overrides: `a.b=c` each, the value in YAML; they win over the files, the last one over the others.
        world_size: Also check that the global batch divides over this many processes.

    Raises:
        RecipeError: With every problem of all the files and overrides at once, each with its file and line.
    """
    merged = merge(Path(path), overrides)
    path = merged.path
    if "stages" in merged.value:
        raise RecipeError([f"{path}: is a pipeline, no recipe: `stamo submit {path} --dry-run` checks it"])
    problems = merged.problems
    if world_size is not None and world_size < 1:
        problems.append(f"world size {world_size}: must be at least 1 process")
        world_size = None
    recipe = None
    if () in merged.places:
        recipe, wrong = validate(merged, world_size)
        problems += wrong
    if recipe is None or problems:
        raise RecipeError(sorted(problems, key=_by_line))
    try:
        name = recipe.name or check_name(path.stem)
    except ValueError as e:
        raise RecipeError([f"{path}: {e}"]) from None
    recipe = recipe.model_copy(update={"name": name, "run_dir": recipe.run_dir or f"runs/{name}"})
    resolved = recipe.model_dump(mode="json")
    written = {dotted(key): place.partition(" ")[0] for key, place in merged.places.items()}
    for derived in ("name", "run_dir"):
        if not merged.value.get(derived):
            written.pop(derived, None)
    if isinstance(merged.value.get("init_from"), str):
        written["init_from.path"] = written["init_from"]
    return Loaded(
        path=path,
        text=merged.text,
        recipe=recipe,
        resolved=resolved,
        provenance={field: _origin(field, written) for field in leaves(resolved)},
    )


def _origin(field: str, written: Mapping[str, str]) -> str:
    """The place of a value, of a map from steps also that of a step that the command line sets."""
    steps = {place for name, place in written.items() if name.startswith(f"{field}.")}
    return "--set" if "--set" in steps else written.get(field, "default")


def dump(recipe: Recipe) -> str:
    """The recipe with every value written out; loads again, by itself, as the same recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _by_line(problem: str) -> tuple[bool, str, int]:
    at = re.match(r"([^\s:]+):(\d+):", problem)
    return (False, at[1], int(at[2])) if at else (True, "", 0)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in a tree of maps; lists, empty maps and maps from steps count as values."""
    names: list[str] = []
    for name, value in tree.items():
        inner = isinstance(value, dict) and bool(value) and not is_by_step(value)
        names += leaves(value, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names
