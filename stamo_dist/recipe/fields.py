"""The recipe's fields with type text, default and documentation, from the pydantic models."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from stamo_dist.recipe.init_from import SHORT_FORMS
from stamo_dist.recipe.lines import Key, show_value
from stamo_dist.recipe.schema import Recipe, Section

#: Stands in keys for the names that a recipe gives the entries of a map, as its sources'.
PLACEHOLDER = "NAME"


@dataclass(frozen=True)
class RecipeField:
    """One field, or one named entry of a map such as `data.sources.NAME`."""

    key: Key
    annotation: Any
    metadata: tuple[Any, ...] = ()
    info: FieldInfo | None = None

    @property
    def kinds(self) -> list[type[Section]]:
        """The sections this field may hold, besides null: several for a union, none for a plain value."""
        union = get_origin(self.annotation) in (Union, types.UnionType)
        options = map(_unannotated, get_args(self.annotation) if union else (self.annotation,))
        return [kind for kind in options if isinstance(kind, type) and issubclass(kind, Section)]

    @property
    def section(self) -> type[Section] | None:
        """The section this field holds, the first of a union, or None for a plain value."""
        return next(iter(self.kinds), None)

    @property
    def entry(self) -> RecipeField | None:
        """The entry field of this map, if it maps free names to sections."""
        if get_origin(self.annotation) is not dict:
            return None
        value = RecipeField((*self.key, PLACEHOLDER), get_args(self.annotation)[1])
        return value if value.section else None

    @property
    def of_map(self) -> tuple[Any, Any] | None:
        """The kinds of names and of values, if it may be a map of plain values."""
        union = get_origin(self.annotation) in (Union, types.UnionType)
        maps = [k for k in (get_args(self.annotation) if union else (self.annotation,)) if get_origin(k) is dict]
        return get_args(maps[0]) if maps and self.entry is None else None

    @property
    def required(self) -> bool:
        return self.info is not None and self.info.is_required()

    @property
    def doc(self) -> str:
        if self.info is not None and self.info.description:
            return self.info.description
        return (self.section.__doc__ or "").strip() if self.section else ""

    @property
    def default(self) -> str:
        if self.info is None or self.section:
            return ""
        return "required" if self.required else show_value(_plain(self.info.get_default(call_default_factory=True)))

    @property
    def words(self) -> str:
        """The type with its limits, as in 'a whole number above 0'."""
        short = "text or " if ".".join(map(str, self.key)) in SHORT_FORMS else ""
        return short + _words(self.annotation, self.metadata)

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers, alone or in a list."""
        return "number" in self.words and "true or false" not in self.words

    def children(self) -> Iterator[RecipeField]:
        """The fields of a section, or of one entry of a map of sections."""
        kinds = self.kinds or (self.entry.kinds if self.entry else [])
        at = self.key if self.section else (*self.key, PLACEHOLDER)
        found: dict[str, RecipeField] = {}
        for name, info in (item for kind in kinds for item in kind.model_fields.items()):
            if name not in found:
                found[name] = RecipeField((*at, name), info.annotation, tuple(info.metadata), info)
            elif found[name].annotation is types.NoneType:  # the first kind cannot have it
                also: Any = info.annotation
                found[name] = RecipeField((*at, name), also | None, tuple(info.metadata), info)
        yield from found.values()

    def child(self, name: Any) -> RecipeField | None:
        if self.section is None:
            return RecipeField((*self.key, name), self.entry.annotation) if self.entry else None
        return next((f for f in self.children() if f.key[-1] == name), None)


ROOT = RecipeField((), Recipe)


def find(key: Key, root: RecipeField = ROOT) -> RecipeField | None:
    """The field at `key`, or None if the schema has none (unknown, or inside a list or a free map)."""
    field: RecipeField | None = root
    for name in key:
        if field is None:
            return None
        field = field.child(name)
    return field


def key_of(place: Key, root: RecipeField = ROOT) -> Key:
    """The key of what pydantic names: after a field that is a union of sections it puts the tag of one of them."""
    key: Key = ()
    field: RecipeField | None = root
    names = iter(place)
    for name in names:
        key, field = (*key, name), None if field is None else field.child(name)
        if field is not None and len(field.kinds) > 1:
            next(names, None)
    return key


def nearest(key: Key, root: RecipeField = ROOT) -> RecipeField:
    """The deepest field on the way to `key`."""
    return next(field for depth in range(len(key), -1, -1) if (field := find(key[:depth], root)))


def all_fields(field: RecipeField = ROOT) -> Iterator[RecipeField]:
    """Every field below `field`, depth first."""
    for child in field.children():
        yield child
        yield from all_fields(child)


def placeholder(annotation: Any) -> Any:
    """A valid value for a required field, so that the rest of a recipe can be checked."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        required = {n: f for n, f in annotation.model_fields.items() if f.is_required()}
        return {name: placeholder(info.annotation) for name, info in required.items()}
    if get_origin(annotation) is dict:
        return {"placeholder": placeholder(get_args(annotation)[1])}
    if get_origin(annotation) in (Union, types.UnionType):
        return placeholder(get_args(annotation)[0])
    return {str: "placeholder", int: 1, float: 1.0, bool: False}.get(annotation)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _unannotated(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _words(kind: Any, metadata: tuple[Any, ...] = ()) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [m for part in args[1:] for m in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _words(args[0], (*inner, *metadata))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys("null" if arg is type(None) else _words(arg, metadata) for arg in args))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin in (list, tuple):
        return "a list" + (f" of {len(args)}" if origin is tuple else "") + f" ({_words(args[0])} each)"
    if isinstance(kind, type) and issubclass(kind, Section):
        return "a map"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a map"}
    return names.get(origin or kind, "anything") + _limits(metadata)


def _limits(metadata: tuple[Any, ...]) -> str:
    limits = []
    for m in metadata:
        limits += [f"above {m.gt}"] if isinstance(m, Gt) else []
        limits += [f"at least {m.ge}"] if isinstance(m, Ge) else []
        limits += [f"below {m.lt}"] if isinstance(m, Lt) else []
        limits += [f"at most {m.le}"] if isinstance(m, Le) else []
    return f" {' and '.join(limits)}" if limits else ""
