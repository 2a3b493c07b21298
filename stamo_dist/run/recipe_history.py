"""The recipe of a run, now and at an earlier step, from what its starts recorded."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from stamo_dist.errors import RunError
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.history import sample

_STEP = "step_"


Changed = dict[str, list[str]]  # recipe field → [old, new]


def changes_of(run: RunFolder) -> list[tuple[int, Changed]]:
    """(last step before it, what changed) for each start with another recipe than the steps before it.

    A start that went back to a step, or was killed before it saved, has abandoned the steps after it: changes that
    earlier starts made there count from that step on, with its own.
    """
    found = list[tuple[int, Changed]]()
    for start in sample(run.path / "starts.jsonl").objects:
        after, changed = start.get("after step", 0), start.get("changed") or {}
        while found and found[-1][0] >= after:
            changed = _together(found.pop()[1], changed)
        found += [(after, changed)] if changed else []
    return found


def _together(first: Changed, then: Changed) -> Changed:
    ends = {field: [first.get(field, pair)[0], pair[1]] for field, pair in (first | then).items()}
    return {field: [old, new] for field, (old, new) in ends.items() if old != new}


def resolved_at(path: str | Path) -> dict[str, Any]:
    """The resolved recipe of a recipe file, a run folder, or a checkpoint as of when it was saved.

    Raises:
        RunError: It is none of them.
        RecipeError: The recipe has problems.
    """
    from stamo_dist.recipe.difference import resolved_of  # here: `stamo status` reads the changes alone
    from stamo_dist.recipe.find import find_recipe
    from stamo_dist.recipe.load import load

    path = Path(path)
    if not path.exists():
        path = find_recipe(path)
    if path.is_file():
        return load(path).resolved
    of_checkpoint = path.name.startswith(_STEP) and path.parent.name == "checkpoints"
    run = RunFolder(path.parent.parent if of_checkpoint else path)
    resolved = resolved_of(run.resolved)
    if resolved is None or not path.is_dir():
        raise RunError(f"{path}: is no recipe, no run folder (with resolved.yaml) and no checkpoint of one")
    return as_of(run, resolved, int(path.name.removeprefix(_STEP))) if of_checkpoint else resolved


def as_of(run: RunFolder, resolved: dict[str, Any], step: int) -> dict[str, Any]:
    """The recipe with which a run trained up to `step`, from that of its last start, which is changed in place."""
    for after, changed in reversed(changes_of(run)):
        if after >= step:
            for field, (old, _) in reversed(changed.items()):
                _put(resolved, field, old)
    return resolved


def _put(tree: dict[str, Any], field: str, text: str) -> None:
    """Give a field its value as YAML; a section that is left empty goes, and has its default."""
    from stamo_dist.recipe.difference import MISSING

    name, _, below = field.partition(".")
    # Else a map of values, whose names may have dots: optimizer.lr_scale.
    section = isinstance(tree.get(name, {}), (dict, NoneType)) and (name in tree or _has_sections(tree))
    if below and section:
        inner = tree[name] = tree.get(name) or {}
        _put(inner, below, text)
        if not inner:
            del tree[name]
    elif text == MISSING:
        tree.pop(field, None)
    else:
        tree[field] = yaml.safe_load(text)


def _has_sections(tree: dict[str, Any]) -> bool:
    return any(isinstance(inner, dict) for inner in tree.values())
