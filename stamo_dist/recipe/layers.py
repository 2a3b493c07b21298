"""A recipe and everything it extends, merged: maps deep-merge, lists replace, later wins, the file itself last."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stamo_dist.paths import canonical
from stamo_dist.recipe.find import closest, find_recipe, shipped_recipe
from stamo_dist.recipe.init_from import SHORT_FORMS
from stamo_dist.recipe.lines import Key, Layer, dotted, is_by_step, located, read_file, read_override, shown

_SOURCES = ("data", "sources")


@dataclass
class Merged(Layer):
    """The merged plain values of all layers, the origin of each, and the problems so far."""

    whole: bool = True  # whether every file could be read
    path: Path = Path()  # the file itself

    def add(self, layer: Layer, override: bool = False) -> None:
        self.problems += layer.problems
        self.unread |= layer.unread
        self.whole &= () not in layer.unread
        _write_out(layer)
        self._refuse_empty(layer)
        _clear_clashes(self.value, layer.value)
        self._remove_sources(layer)
        self._remove_steps(layer)
        self._forget_replaced(layer)
        merged = OmegaConf.merge(OmegaConf.create(self.value), OmegaConf.create(layer.value))
        self.value = OmegaConf.to_container(merged)  # type: ignore[assignment]
        for key, place in layer.places.items():
            is_map = isinstance(value_at(layer.value, key), dict)
            if not is_map:
                for old in [k for k in self.places if k[: len(key)] == key]:
                    del self.places[old]
            if not (override and is_map and key in self.places):
                self.places[key] = place

    def _refuse_empty(self, layer: Layer) -> None:
        """An empty map is none of the ways to take out what a map has: maps are merged."""
        for key, place in layer.places.items():
            inherited = value_at(self.value, key)
            if key and value_at(layer.value, key) == {} and isinstance(inherited, dict) and inherited:
                remedy = f"{dotted(_SOURCES)}.NAME: null removes one" if key == _SOURCES else "name what is to change"
                message = f"an empty map removes nothing, as maps are merged: {', '.join(map(str, inherited))} stay"
                self.problems.append(located(place, key, f"{message}; {remedy}"))

    def _remove_sources(self, layer: Layer) -> None:
        """`data.sources.NAME: null` removes an inherited source from the mixture."""
        sources, inherited = (value_at(value, _SOURCES) for value in (layer.value, self.value))
        sources, inherited = (s if isinstance(s, dict) else {} for s in (sources, inherited))
        for name in [n for n, source in sources.items() if source is None]:
            key = (*_SOURCES, name)
            if name not in inherited and self.whole:
                hint = did_you_mean(name, inherited) or f"there are {', '.join(inherited) or 'none'}"
                message = f"null removes an inherited source, but none has this name; {hint}"
                self.problems.append(located(layer.places[key], key, message))
            inherited.pop(name, None)
            del sources[name], layer.places[key]
            for old in [k for k in self.places if k[:3] == key]:
                del self.places[old]

    def _remove_steps(self, layer: Layer) -> None:
        """A map from steps, such as a weight that changes, replaces the inherited one; they are not merged."""
        for key in layer.places:
            if is_by_step(value_at(layer.value, key)) and is_by_step(value_at(self.value, key)):
                del value_at(self.value, key[:-1])[key[-1]]
                for old in [k for k in self.places if k[: len(key)] == key]:
                    del self.places[old]

    def _forget_replaced(self, layer: Layer) -> None:
        """Where a map takes the place of another value, the place of that value says nothing any more."""
        for key in layer.places:
            for above in (key[:depth] for depth in range(1, len(key) + 1)):
                if isinstance(value_at(layer.value, above), dict) and not isinstance(value_at(self.value, above), dict):
                    self.places.pop(above, None)


def merge(path: Path, overrides: Sequence[str] = ()) -> Merged:
    """Read `path`, all it extends and the overrides, and merge them.

    Where there is no such file, it is a name of `stamo recipe list`. A file reached twice counts once, at its first
    place.
    """
    out = Merged(path=path)
    _add_file(path, out, stack=[], done=set(), at="")
    for override in overrides:
        out.add(read_override(override), override=True)
    return out


def did_you_mean(word: str, known: Any) -> str:
    """'did you mean X?' for the closest of the known words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""


def _add_file(path: Path, out: Merged, stack: list[Path], done: set[Path], at: str) -> None:
    where = Path(canonical(path))
    if where in stack:
        names = " → ".join(shown(p) for p in [*stack[stack.index(where) :], where])
        out.problems.append(f"{at}: extends: goes round in a circle: {names}")
        out.whole = False
        return
    if where in done:
        return
    layer = read_file(path)
    if () in layer.unread and not path.is_file():
        _add_named(path, out, stack, done, at)
        return
    for key, name in _extends(layer, out):
        _add_file(where.parent / Path(name).expanduser(), out, [*stack, where], done, layer.places[key])
    done.add(where)
    out.add(layer)
    out.text = layer.text


def _add_named(path: Path, out: Merged, stack: list[Path], done: set[Path], at: str) -> None:
    """In place of a file that is not there, the recipe of this name: for `extends`, of those that come with stamo."""
    named = shipped_recipe(os.path.relpath(path, stack[-1].parent)) if stack else find_recipe(path)
    if named.is_file():
        out.path = out.path if stack else named
        _add_file(named, out, stack, done, at)
        return
    out.problems.append(_missing(path, stack[-1] if stack else None, at))
    out.whole = False


def _extends(layer: Layer, out: Merged) -> list[tuple[Key, str]]:
    """Remove `extends` from a layer; returns (place, name) of each entry."""
    value = layer.value.pop("extends", [])
    entries: list[tuple[Key, Any]] = [(("extends",), value)]
    if isinstance(value, list):
        entries = [(("extends", i), name) for i, name in enumerate(value)]
    good = [(key, name) for key, name in entries if isinstance(name, str) and name]
    if len(good) < len(entries):
        out.problems.append(f"{layer.places[('extends',)]}: extends: must be a file name or a list of file names")
        out.whole = False
    return good


def _missing(path: Path, extender: Path | None, at: str) -> str:
    siblings = [p.name for p in path.parent.glob("*.y*ml") if p.resolve() != extender] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if extender is None:
        near = str(path.parent / close[0]) if close else closest(path)
        hint = f"did you mean {near}?" if near else "`stamo recipe list` shows what can be given by name"
        return f"{path}: {'is a folder, not a recipe' if path.is_dir() else 'no such file'}; {hint}"
    name = os.path.relpath(path, extender.parent)
    if Path(name).is_file():
        hint = f"; did you mean {os.path.relpath(name, extender.parent)}?"
    elif close:
        hint = f"; did you mean {os.path.relpath(path.parent / close[0], extender.parent)}?"
    else:
        hint = ""
    return f"{at}: extends: {name}: no such file (names are relative to {shown(extender.parent)}/){hint}"


def _write_out(layer: Layer) -> None:
    """Write short forms as the maps they stand for, so that they are merged with other fields of those maps."""
    for name, field in SHORT_FORMS.items():
        if isinstance(value := layer.value.get(name), str):
            layer.value[name] = {field: value}
            layer.places[(name, field)] = layer.places[(name,)]


def _clear_clashes(old: Any, new: Any) -> None:
    """A list cannot be merged with a map: if they clash, remove the old one (OmegaConf would raise)."""
    for name, value in new.items():
        before = old.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            _clear_clashes(before, value)
        elif isinstance(before, list | dict) and isinstance(value, list | dict):
            old[name] = value


def value_at(value: Any, key: Key) -> Any:
    for name in key:
        try:
            value = value[name]
        except (KeyError, IndexError, TypeError):
            return None
    return value
