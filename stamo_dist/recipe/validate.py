"""Merged values → `Recipe`, or every problem at once, each with its place and in words."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from stamo_dist.recipe.fields import all_fields, find, nearest, placeholder
from stamo_dist.recipe.layers import Merged, did_you_mean, value_at
from stamo_dist.recipe.lines import Key, dotted, located, show_value
from stamo_dist.recipe.schema import Recipe, Train, batching

_STARTS_WITH_FIELD = re.compile(r"([a-z_]\w*(?:\.[\w-]+)+): (.*)", re.DOTALL)


def validate(merged: Merged, world_size: int | None = None) -> tuple[Recipe | None, list[str]]:
    """Check everything that can be checked.

    A wrong value hides the checks that need it. So each wrong value is recorded, replaced by a valid one and the
    recipe checked again, until nothing new comes up. A check that names a replaced value is dropped, and so is
    whatever may rest on a file that could not be read.
    """
    tree = copy.deepcopy(merged.value)
    found: dict[Key, list[str]] = {nearest(key).key: [] for key in merged.unread if key}
    for key in merged.places:
        field = nearest(key)
        if isinstance(value_at(tree, key), bool) and field.is_number:  # pydantic would read true as 1
            found.setdefault(field.key, [_wrong_value(field.key, value_at(tree, field.key))])
    for key in found:
        _repair(tree, key)
    recipe = None
    while recipe is None:
        try:
            recipe = Recipe.model_validate(tree)
        except ValidationError as e:
            fresh: dict[Key, list[str]] = {}
            for key, message, kind in _messages(e, tree):
                if key not in found:
                    messages = fresh.setdefault(key, [])
                    guess = kind in ("missing", "value_error") and not merged.whole
                    guess |= kind == "value_error" and _names_any(message, found)
                    messages += [] if guess or message in messages else [message]
            found |= fresh
            if not fresh or () in fresh:
                break
            for key in fresh:
                _repair(tree, key)
    problems = [_placed(key, message, merged.places) for key, messages in found.items() for message in messages]
    if world_size is not None and not {("train",), ("train", "global_batch")} & found.keys() and "train" in tree:
        try:
            batching(Train.model_validate(tree["train"]), world_size)
        except ValueError as e:
            problems.append(_placed((), str(e), merged.places))
    return (recipe if not problems else None), problems


def place_of(key: Key, places: Mapping[Key, str]) -> str:
    """Where a value stands; for one that is not there, where the map around it stands."""
    if key not in places:
        below = [place for k, place in places.items() if k[: len(key)] == key]
        return below[0] if below and key else place_of(key[:-1], places)
    return places[key]


def _placed(key: Key, message: str, places: Mapping[Key, str]) -> str:
    if match := _STARTS_WITH_FIELD.fullmatch(message):
        key, message = tuple(match[1].split(".")), match[2]
    return located(place_of(key, places), key, message)


def _messages(error: ValidationError, tree: dict[str, Any]) -> Iterator[tuple[Key, str, str]]:
    """(field, message, pydantic's name of the problem) for each problem pydantic found."""
    for e in error.errors(include_url=False):
        key = e["loc"]
        if e["type"] == "value_error":
            for line in str(e["ctx"]["error"]).splitlines():
                yield key, line, "value_error"
        elif e["type"] == "missing" and find(key):
            yield key, _missing(key, tree), "missing"
        elif e["type"] == "extra_forbidden":
            yield key, _unknown(key), "extra_forbidden"
        else:
            key = nearest(key).key
            yield key, _wrong_value(key, value_at(tree, key)), "value"


def _names_any(message: str, keys: Mapping[Key, Any]) -> bool:
    return any(re.search(rf"\b{re.escape(str(key[-1]))}\b", message) for key in keys if key)


def _missing(key: Key, tree: dict[str, Any]) -> str:
    field = nearest(key)
    needs = ", ".join(str(f.key[-1]) for f in field.children() if f.required)
    message = f"missing ({field.words}{f' with {needs}' if field.section else ''}): {field.doc}"
    if key[:2] == ("data", "sources") and len(key) > 2:  # a mistyped source name makes a new source without its path
        others = [name for name in value_at(tree, key[:2]) if name != key[2]]
        hint = did_you_mean(str(key[2]), others)
        message += f" ({hint})" if hint else ""
    return message


def _unknown(key: Key) -> str:
    section, name = nearest(key[:-1]), str(key[-1])
    elsewhere = [dotted(f.key) for f in all_fields() if f.key[-1] == name][:3]
    if elsewhere:
        return f"no such field; did you mean {' or '.join(elsewhere)}?"
    siblings = [str(f.key[-1]) for f in section.children()]
    known = f"{dotted(section.key)} has" if section.key else "there are"
    return "no such field; " + (did_you_mean(name, siblings) or f"{known} {', '.join(siblings)}")


def _wrong_value(key: Key, value: Any) -> str:
    field = nearest(key)
    if value is None and field.section:
        return "empty; give it fields or remove the line"
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"must be {field.words}, not {show_value(value)}" + (f"; {hint}" if hint else "")


def _repair(tree: dict[str, Any], key: Key) -> None:
    """Replace a wrong value by its default, or by a placeholder where it has none."""
    parent = value_at(tree, key[:-1])
    if not key or not isinstance(parent, dict):
        return
    field = find(key)
    parent.pop(key[-1], None)
    if field and (field.required or field.info is None):
        parent[key[-1]] = placeholder(field.annotation)
