"""Validating merged values into a `Recipe` or another section, or listing all problems with their places."""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from stamo_dist.recipe.batching import batching
from stamo_dist.recipe.fields import ROOT, RecipeField, all_fields, find, key_of, nearest, placeholder
from stamo_dist.recipe.layers import Merged, did_you_mean, value_at
from stamo_dist.recipe.lines import Key, dotted, located, show_value
from stamo_dist.recipe.schema import SECTIONS_ALONE, Recipe
from stamo_dist.recipe.section import Section
from stamo_dist.recipe.training import Train

T = TypeVar("T", bound=Section)

_STARTS_WITH_FIELD = re.compile(r"([a-z_]\w*(?:\.[\w-]+)*): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Validated:
    """A recipe as far as it is valid.

    Attributes:
        recipe: With defaults and placeholders for wrong values; None if a file could not be read.
        problems: Of the merged layers, each with its place.
        wrong: Fields, or sections, that do not have the values written.
        clashing: Sections whose fields, as written, contradict each other or those of others.
    """

    recipe: Recipe | None
    problems: list[str]
    wrong: set[Key]
    clashing: set[str]


def validate(merged: Merged, world_size: int | None = None) -> Validated:
    """The recipe of the merged layers, and their problems, also for `world_size` processes."""
    recipe, found, tree = _check(merged, Recipe, ROOT)
    problems = _placed_all(found, merged)
    if world_size is not None and not {("train",), ("train", "global_batch")} & found.keys() and "train" in tree:
        try:
            batching(Train.model_validate(tree["train"]), world_size)
        except ValueError as e:
            problems.append(_placed((), str(e), merged.places))
    clashes = "\n".join(found.get((), ()))
    if recipe is None and merged.whole:
        with contextlib.suppress(ValidationError):
            recipe = Recipe.model_validate(tree, context={SECTIONS_ALONE: True})
    clashing = {section for section in Recipe.model_fields if re.search(rf"\b{section}\.", clashes)}
    return Validated(recipe, problems, _replaced(found.keys() - {()}, merged), clashing)


def _replaced(found: Iterable[Key], merged: Merged) -> set[Key]:
    """The fields found wrong; of an unknown one, those beside it that nobody set and that may be meant."""
    wrong = set(found)
    for key in found:
        section = nearest(key[:-1], ROOT)
        if find(key, ROOT) is None and section.section is not None:
            unset = {str(f.key[-1]): f.key for f in section.children() if f.key not in merged.places}
            meant = unset if section.key else difflib.get_close_matches(str(key[-1]), unset, n=1)
            wrong |= {unset[name] for name in meant}
    return wrong


def validate_as(model: type[T], merged: Merged) -> tuple[T | None, list[str]]:
    """The section of a file that is not a recipe, or its problems."""
    section, found = repaired(model, merged)
    problems = [problem for of_field in found.values() for problem in of_field]
    return (section if not problems else None), problems


def repaired(model: type[T], merged: Merged) -> tuple[T | None, dict[Key, list[str]]]:
    """As `validate_as`, with the problems by field; the section has defaults and placeholders for wrong values."""
    section, found, _ = _check(merged, model, RecipeField((), model))
    return section, {key: [_placed(key, m, merged.places) for m in messages] for key, messages in found.items()}


def _check(merged: Merged, model: type[T], root: RecipeField) -> tuple[T | None, dict[Key, list[str]], dict[str, Any]]:
    """Check all that can be checked; returns (section, problems by field, values with repairs).

    A wrong value hides the checks that need it. So each wrong value is recorded, replaced by a valid one and the
    section checked again, until no new problem appears. A check that names a replaced value is dropped, and so is
    any that may depend on a file that could not be read.
    """
    tree = copy.deepcopy(merged.value)
    found: dict[Key, list[str]] = {nearest(key, root).key: [] for key in merged.unread if key}
    for key in merged.places:
        field = nearest(key, root)
        if isinstance(value_at(tree, key), bool) and field.is_number:  # pydantic would accept true as 1
            found.setdefault(field.key, [_wrong_value(field, value_at(tree, field.key))])
    for key in found:
        _repair(tree, key, root)
    section = None
    while section is None:
        try:
            section = model.model_validate(tree)
        except ValidationError as e:
            fresh: dict[Key, list[str]] = {}
            for key, message, kind in _messages(e, tree, root):
                if key not in found:
                    messages = fresh.setdefault(key, [])
                    guess = kind in ("missing", "value_error") and not merged.whole
                    guess |= kind == "value_error" and _names_any(message, found)
                    messages += [] if guess or message in messages else [message]
            found |= fresh
            if not fresh or () in fresh:
                break
            for key in fresh:
                _repair(tree, key, root)
    return section, found, tree


def place_of(key: Key, places: Mapping[Key, str]) -> str:
    """The place of a value; of a missing one, the place of the enclosing map."""
    if key not in places:
        below = [place for k, place in places.items() if k[: len(key)] == key]
        return below[0] if below and key else place_of(key[:-1], places)
    return places[key]


def _placed_all(found: Mapping[Key, list[str]], merged: Merged) -> list[str]:
    return [_placed(key, message, merged.places) for key, messages in found.items() for message in messages]


def _placed(key: Key, message: str, places: Mapping[Key, str]) -> str:
    match = _STARTS_WITH_FIELD.fullmatch(message)
    if match and ("." in match[1] or (not key and (match[1],) in places)):
        key, message = tuple(match[1].split(".")), match[2]
    return located(place_of(key, places), key, message)


def _messages(error: ValidationError, tree: dict[str, Any], root: RecipeField) -> Iterator[tuple[Key, str, str]]:
    """(field, message, pydantic's name of the problem) for each problem pydantic found."""
    for e in error.errors(include_url=False):
        key = key_of(e["loc"], root)
        if e["type"] == "value_error":
            for line in str(e["ctx"]["error"]).splitlines():
                yield key, line, "value_error"
        elif e["type"] == "missing" and find(key, root):
            yield key, _missing(nearest(key, root), tree), "missing"
        elif e["type"] == "extra_forbidden":
            yield key, _unknown(key, root), "extra_forbidden"
        else:
            field = nearest(key, root)
            value = value_at(tree, field.key)
            messages = _wrong_entries(field, value) if isinstance(value, dict) else []
            for message in messages or [_wrong_value(field, value)]:
                yield field.key, message, "value"


def _names_any(message: str, keys: Mapping[Key, Any]) -> bool:
    return any(re.search(rf"\b{re.escape(str(key[-1]))}\b", message) for key in keys if key)


def _missing(field: RecipeField, tree: dict[str, Any]) -> str:
    key = field.key
    needs = ", ".join(str(f.key[-1]) for f in field.children() if f.required)
    message = f"missing ({field.words}{f' with {needs}' if field.section else ''}): {field.doc}"
    if key[:2] == ("data", "sources") and len(key) > 2:  # a mistyped source name creates a new source without a path
        others = [name for name in value_at(tree, key[:2]) if name != key[2]]
        hint = did_you_mean(str(key[2]), others)
        message += f" ({hint})" if hint else ""
    return message


def _unknown(key: Key, root: RecipeField) -> str:
    section, name = nearest(key[:-1], root), str(key[-1])
    elsewhere = [dotted(f.key) for f in all_fields(root) if f.key[-1] == name][:3]
    if elsewhere:
        return f"no such field; did you mean {' or '.join(elsewhere)}?"
    siblings = [str(f.key[-1]) for f in section.children()]
    known = f"{dotted(section.key)} has" if section.key else "there are"
    return "no such field; " + (did_you_mean(name, siblings) or f"{known} {', '.join(siblings)}")


def _wrong_value(field: RecipeField, value: Any) -> str:
    if value is None and field.section:
        return "empty; give it fields or remove the line"
    choices = [c for c in get_args(field.annotation) if isinstance(c, str)]
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    if isinstance(value, str) and (name := field.child("name")) and value in get_args(name.annotation):
        hint = f"did you mean {dotted(name.key)}={value}?"
    if isinstance(value, str) and field.words.startswith("a list"):
        hint = f"did you mean [{value}]?"
    return f"must be {field.words}, not {show_value(value)}" + (f"; {hint}" if hint else "")


def _wrong_entries(field: RecipeField, value: dict[str, Any]) -> list[str]:
    """The problems of single entries of a field that may be a map of plain values, such as sizes by step."""
    if (kinds := field.of_map) is None:
        return []
    (of_name, of_entry), messages = kinds, list[str]()
    for name, entry in value.items():
        at = (*field.key, name)
        if not _is_valid(of_name, name):
            hint = "; write a space after the colon" if ":" in str(name) else ""
            messages.append(f"{dotted(at)}: the name must be {RecipeField(at, of_name).words}{hint}")
        elif isinstance(entry, bool) or not _is_valid(of_entry, entry):
            messages.append(f"{dotted(at)}: {_wrong_value(RecipeField(at, of_entry), entry)}")
    return messages


def _is_valid(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def _repair(tree: dict[str, Any], key: Key, root: RecipeField) -> None:
    """Replace a wrong value by its default, or by a placeholder if it has none."""
    parent = value_at(tree, key[:-1])
    if not key or not isinstance(parent, dict):
        return
    field = find(key, root)
    parent.pop(key[-1], None)
    if field and (field.required or field.info is None):
        parent[key[-1]] = placeholder(field.annotation)
