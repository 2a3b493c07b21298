"""`load` reads a recipe: what it extends and the overrides are merged, checked, and traced to their lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stamo_dist.errors import RecipeError
from stamo_dist.recipe.layers import Merged, merge
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
    overrides: tuple[str, ...] = ()  # `a.b=c` each

    def command(self, verb: str) -> str:
        """`stamo VERB` for this recipe, as one types it."""
        return shlex.join(["stamo", verb, str(self.path), *(word for o in self.overrides for word in ("--set", o))])

    def origin(self, field: str) -> str:
        """As `provenance`, with the name given to `--set`: of the field, a section around it or an entry of it."""
        place = self.provenance.get(field, "default")
        names = [override.partition("=")[0].strip() for override in reversed(self.overrides)]
        near = [n for n in names if f"{field}.".startswith(f"{n}.") or n.startswith(f"{field}.")]
        return f"--set {near[0]}" if place == "--set" and near else place


@dataclass(frozen=True)
class Draft:
    """A recipe as far as it is valid.

    Attributes:
        loaded: With defaults for wrong values, and without the sources that have some; None if a file is unreadable.
        problems: Each with its file and line, in their order.
        wrong: Dotted fields, or sections, that do not have the values written.
        doubtful: Sections with any problem.
    """

    loaded: Loaded | None
    problems: list[str] = field(default_factory=list)
    wrong: frozenset[str] = frozenset()
    doubtful: frozenset[str] = frozenset()


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
    draft = load_draft(path, overrides, world_size)
    if draft.loaded is None or draft.problems:
        raise RecipeError(draft.problems)
    return draft.loaded


def load_draft(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Draft:
    """As `load`, with the problems beside what is valid in place of raised."""
    merged = merge(Path(path), overrides)
    path = merged.path
    if "stages" in merged.value:
        return Draft(None, [f"{path}: is a pipeline, no recipe: `stamo submit {path} --dry-run` checks it"])
    problems = merged.problems
    if world_size is not None and world_size < 1:
        problems.append(f"world size {world_size}: must be at least 1 process")
        world_size = None
    if () not in merged.places:
        return Draft(None, sorted(problems, key=_by_line))
    validated = validate(merged, world_size)
    problems = sorted([*problems, *validated.problems], key=_by_line)
    recipe = validated.recipe
    if recipe is None:
        return Draft(None, problems)
    try:
        name = recipe.name or check_name(path.stem)
    except ValueError as e:
        return Draft(None, [*problems, f"{path}: {e}"])
    recipe = recipe.model_copy(update={"name": name, "run_dir": recipe.run_dir or f"runs/{name}"})
    if bad := {str(key[2]) for key in validated.wrong if key[:2] == ("data", "sources") and len(key) > 2}:
        sources = {name: source for name, source in recipe.data.sources.items() if name not in bad}
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})
    loaded = _traced(recipe, merged, tuple(overrides))
    wrong = frozenset(dotted(key) for key in validated.wrong)
    return Draft(loaded, problems, wrong, frozenset(validated.clashing | {str(key[0]) for key in validated.wrong}))


def _traced(recipe: Recipe, merged: Merged, overrides: tuple[str, ...]) -> Loaded:
    resolved = recipe.model_dump(mode="json")
    written = {dotted(key): place.partition(" ")[0] for key, place in merged.places.items()}
    for derived in ("name", "run_dir"):
        if not merged.value.get(derived):
            written.pop(derived, None)
    return Loaded(
        path=merged.path,
        text=merged.text,
        recipe=recipe,
        resolved=resolved,
        provenance={name: _origin(name, written) for name in leaves(resolved)},
        overrides=overrides,
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
