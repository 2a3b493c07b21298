"""What differs between two recipes, by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stamo_dist.recipe.lines import is_by_step, show_value
from stamo_dist.recipe.load import leaves
from stamo_dist.recipe.schema import Recipe

#: Of a field that one of the two recipes lacks.
MISSING = "not there"
_SHOWN = 80  # characters of a value


@dataclass(frozen=True)
class Change:
    """A field with another value, both as YAML on one line."""

    field: str
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…" for text in (self.old, self.new))
        return f"{self.field}: {old} → {new}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every field in which two resolved recipes differ; fields that the older version lacked have their defaults."""
    before, now = _completed(old), _completed(new)
    fields = dict.fromkeys([*leaves(before), *leaves(now)])
    found = [(field, value_of(before, field), value_of(now, field)) for field in fields]
    return [Change(field, _shown(a), _shown(b)) for field, a, b in found if a != b and not _inner(a) and not _inner(b)]


def resolved_of(file: Path) -> dict[str, Any] | None:
    """The values of a run's resolved.yaml; None without one that can be read."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _completed(resolved: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return Recipe.model_validate(resolved).model_dump(mode="json")
    except ValidationError:  # of a version with other fields
        return resolved


def value_of(tree: Mapping[str, Any], field: str) -> Any:
    """The value of a dotted field, `MISSING` if there is none; names in maps may have dots (`optimizer.lr_scale`)."""
    if field in tree:
        return tree[field]
    for name, inner in tree.items():
        if isinstance(inner, Mapping) and field.startswith(f"{name}."):
            found = value_of(inner, field.removeprefix(f"{name}."))
            if found is not MISSING:
                return found
    return MISSING


def _inner(value: Any) -> bool:
    """Whether it is a section whose fields are compared one by one."""
    return isinstance(value, Mapping) and bool(value) and not is_by_step(value)


def _shown(value: Any) -> str:
    return value if value is MISSING else show_value(value, limit=1 << 20)
