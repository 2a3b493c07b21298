"""Reading and writing YAML with the place of every value, so that each problem can name its line.

The accepted language is YAML 1.2's core schema (`off`, `yes` and `010` are text, `1e-4` is a number) without anchors,
merge keys, tags and `${…}`: so a file's meaning does not depend on such features.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[Any, ...]  # path of a value: names, and indices inside lists

_CORE = [
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
]


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    pass


_Loader.yaml_implicit_resolvers = {}
for _cls in (_Loader, _Dumper):  # quotes values that YAML 1.1 or 1.2 would misread
    for _name, _pattern, _first in _CORE:
        _cls.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first]
        )


@dataclass
class Layer:
    """One file, or one `--set`: its values, the place of each, and problems of the text itself."""

    value: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[Key] = field(default_factory=set)  # values already reported in `problems`
    text: str = ""


def dotted(key: Key) -> str:
    return ".".join(map(str, key))


def located(place: str, key: Key, message: str) -> str:
    """A problem as printed: place, field, message."""
    return f"{place}: {message}" if not key or place == f"--set {dotted(key)}" else f"{place}: {dotted(key)}: {message}"


def shown(path: Path) -> str:
    """`path` as messages show it: relative to the working directory if below it."""
    path = Path(os.path.abspath(path))  # not resolved: that asks the disk for each folder above it, on every rank
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)


def read_file(path: Path) -> Layer:
    """Read one recipe file; its problems are in `.problems`."""
    name = shown(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        return Layer(problems=[f"{name}: cannot be read: {e.strerror}"], unread={()})
    except UnicodeDecodeError as e:
        return Layer(problems=[f"{name}: is not UTF-8 text: byte {e.start} is {e.object[e.start]:#04x}"], unread={()})
    layer = Layer(text=text)
    value = _parse(text, (), layer, lambda line, column=None: f"{name}:{line}" + (f":{column}" if column else ""))
    if isinstance(value, dict):
        layer.value = value
    elif value is not None:
        layer.problems.append(f"{name}:1: a recipe is a map of fields (name: value), not {show_value(value)}")
        layer.unread.add(())
    layer.places.setdefault((), f"{name}:1")
    return layer


def read_override(override: str) -> Layer:
    """Read one `FIELD=VALUE` of the command line; VALUE is YAML."""
    path, equals, text = override.partition("=")
    path = path.strip()
    place = f"--set {path}"
    names = path.split(".")
    if not equals or not all(names):
        return Layer(problems=[f"--set {override}: write FIELD=VALUE, for example --set train.steps=1000"])
    layer = Layer(places={tuple(names): place})
    value = _parse(text, tuple(names), layer, lambda line, column=None: place)
    if layer.unread:
        return layer
    for depth in range(len(names) - 1, -1, -1):
        value = {names[depth]: value}
    layer.value = value
    return layer


def dump_yaml(value: Any) -> str:
    """Write plain values so that `read_file` reads the same values back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def is_by_step(value: Any) -> bool:
    """Whether a value is a map from steps, as text or numbers, to values other than maps."""
    if not isinstance(value, Mapping) or any(isinstance(inner, Mapping) for inner in value.values()):
        return False
    return bool(value) and all(str(name).lstrip("-").isdecimal() for name in value)


def show_value(value: Any, limit: int = 60) -> str:
    """A value on one line, as YAML writes it."""
    if is_by_step(value):
        value = {int(step): of_step for step, of_step in value.items()}
    elif isinstance(value, dict) and value:
        return "a map"
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=1 << 20)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _parse(text: str, root: Key, layer: Layer, place: Callable[..., str]) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Converter(loader, layer, place).convert(node, root, None)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        what = ", ".join(part for part in (e.context, e.problem) if part)
        where = place(mark.line + 1, mark.column + 1) if mark else place(1)
        layer.problems.append(f"{where}: not readable as YAML: {what}")
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        layer.problems.append(f"{place(line)}: not readable as YAML: character {e.character:#x}: {e.reason}")
    except RecursionError:
        layer.problems.append(f"{place(1)}: not readable as YAML: nested too deeply")
    layer.unread.add(root)
    return None


@dataclass
class _Converter:
    loader: _Loader
    layer: Layer
    place: Callable[..., str]

    def convert(self, node: yaml.Node, key: Key, at: str | None) -> Any:
        at = at or self.place(node.start_mark.line + 1)
        self.layer.places[key] = at
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.convert(item, (*key, i), None) for i, item in enumerate(node.value)]
        value = None
        if isinstance(node, yaml.ScalarNode) and node.tag.rpartition(":")[2] in {"str", "null", "bool", "int", "float"}:
            value = self.loader.construct_object(node)
            if not isinstance(value, str) or ("${" not in value and value != "???"):
                return value
            self._problem(at, key, f"{value}: recipes have no interpolation; write the value itself")
        else:
            self._problem(at, key, f"the tag {node.tag} is not read; write plain values")
        self.layer.unread.add(key)
        return None

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        out: dict[str, Any] = {}
        first: dict[str, int] = {}
        by_step = bool(key) and any(_is(name_node, "int") for name_node, _ in node.value)
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            at = self.place(line)
            is_step = by_step and _is(name_node, "int")
            if not is_step and not _is(name_node, "str"):
                text = name_node.value if isinstance(name_node, yaml.ScalarNode) else "of this value"
                way = "write a whole number" if by_step else "put it in quotes"
                self._problem(at, key, f"the name {text} is not text; {way}")
                continue
            name = str(self.loader.construct_object(name_node)) if is_step else name_node.value
            if name == "<<":
                self._problem(at, key, "merge keys (<<) are not read; use extends")
            elif name in out:
                self._problem(at, (*key, name), f"given twice, first on line {first[name]}; keep one of them")
            else:
                first[name] = line
                out[name] = self.convert(value_node, (*key, name), at)
        return out

    def _problem(self, at: str, key: Key, message: str) -> None:
        self.layer.problems.append(located(at, key, message))


def _is(node: yaml.Node, kind: str) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == f"tag:yaml.org,2002:{kind}"
