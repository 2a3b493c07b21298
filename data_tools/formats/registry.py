"""Source formats by name, and their options. A format's module is imported only when it is asked for."""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from data_tools.formats.source import SourceReader
from stamo_dist.errors import DataError
from stamo_dist.extras import how_to_install
from stamo_dist.recipe.layers import did_you_mean
from stamo_dist.shipped import page

#: Format → module and class of its Reader, and what it reads.
FORMATS: dict[str, tuple[str, str]] = {
    "libero": (
        "data_tools.formats.libero.LiberoReader",
        "LIBERO's HDF5: official, regenerated, and of `stamo data simulate`",
    ),
    "metaworld": (
        "data_tools.formats.metaworld.MetaworldReader",
        "Meta-World episodes in HDF5",
    ),
    "robomimic": (
        "data_tools.formats.robomimic.RobomimicReader",
        "robomimic's HDF5, also RoboCasa's and Isaac Lab's",
    ),
    "aloha": (
        "data_tools.formats.aloha.AlohaReader",
        "ALOHA's and ACT's HDF5: an episode a file, raw frames or JPEGs",
    ),
    "maniskill": (
        "data_tools.formats.maniskill.ManiskillReader",
        "ManiSkill's HDF5 with its JSON",
    ),
    "zarr": (
        "data_tools.formats.replay_buffer.ReplayBufferReader",
        "ReplayBuffers of Diffusion Policy and UMI: .zarr and .zarr.zip",
    ),
    "rlds": (
        "data_tools.formats.rlds.RldsReader",
        "RLDS (TFDS): Bridge, DROID, Open X-Embodiment; needs no TensorFlow",
    ),
    "lerobot": (
        "data_tools.formats.lerobot.LerobotReader",
        "LeRobotDataset v2.1 and v3.0: parquet and mp4",
    ),
    "droid-raw": (
        "data_tools.formats.droid_raw.DroidRawReader",
        "DROID's raw episodes: trajectory.h5 and mp4",
    ),
    "calvin": (
        "data_tools.formats.calvin.CalvinReader",
        "CALVIN's play data as it is downloaded: an .npz a frame",
    ),
    "rosbag": (
        "data_tools.formats.rosbag.RosbagReader",
        "ROS bags: MCAP, rosbag2's SQLite, ROS 1's .bag; topics become cameras, actions, state",
    ),
    "video": (
        "data_tools.formats.video.VideoReader",
        "a folder of videos, or segments of them; presets for human video sets",
    ),
}
#: Other dataset names → the format that reads them.
NEAREST = {
    **dict.fromkeys(("umi", "diffusion-policy", "diffusion_policy", "replay-buffer", "pusht"), "zarr"),
    **dict.fromkeys(("act", "mobile-aloha", "mobile_aloha", "interbotix"), "aloha"),
    **dict.fromkeys(("robocasa", "mimicgen", "isaaclab", "isaac-lab", "robosuite", "hdf5", "h5"), "robomimic"),
    **dict.fromkeys(("tfds", "oxe", "openx", "open-x-embodiment", "bridge", "tfrecord"), "rlds"),
    **dict.fromkeys(("groot", "gr00t", "openpi", "agibot", "so100", "parquet"), "lerobot"),
    **dict.fromkeys(("ros", "ros1", "ros2", "bag", "mcap", "rosbag2", "db3"), "rosbag"),
    **dict.fromkeys(("task_d_d", "task_abc_d", "task_abcd_d"), "calvin"),
    **dict.fromkeys(("droid", "droid_raw"), "droid-raw"),
    **dict.fromkeys(("mp4", "ssv2", "ego4d", "epic-kitchens", "egodex"), "video"),
}
ADD = f'to read another, write a reader: {page("convert.md")}, "Add a format"'
#: Fields of a Reader that are not options of `--set`.
COMMON = ("src", "cameras")

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Option:
    """One option of a format."""

    name: str
    type: Any
    default: Any
    doc: str


def reader_class(format: str) -> Any:
    """The Reader class of a source format.

    Raises:
        DataError: Unknown format, or its libraries are not installed.
    """
    if format not in FORMATS:
        near = NEAREST.get(format.lower())
        hint = f"the nearest is {near} ({FORMATS[near][1]})" if near else _suggest(format, FORMATS)
        raise DataError(f"unknown format {format!r}; {hint}; {ADD}")
    module, name = FORMATS[format][0].rsplit(".", 1)
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as e:
        raise DataError(f"format {format} needs the package {e.name}; {how_to_install('convert')}") from e


def open_reader(format: str, src: Path, options: Mapping[str, Any]) -> SourceReader:
    """The Reader of a source; `options` are the format's own, and `cameras`.

    Raises:
        DataError: Unknown format, or unknown options, all at once.
    """
    found = reader_class(format)
    known = [field.name for field in fields(found) if field.name != "src"]
    if unknown := [name for name in options if name not in known]:
        raise DataError("\n".join(_unknown(format, name, known) for name in unknown))
    return found(src, **options)


def options_of(format: str) -> list[Option]:
    """The format's own options, with the explanations of its Reader's docstring and in their order."""
    found = reader_class(format)
    hints, docs = get_type_hints(found), _argument_docs(found)
    options = []
    order = {name: i for i, name in enumerate(docs)}
    for field in sorted(fields(found), key=lambda field: order.get(field.name, len(order))):
        if field.name in COMMON:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        options.append(Option(field.name, hints[field.name], default, docs.get(field.name, "")))
    return options


def parse_options(format: str, settings: Iterable[str]) -> dict[str, Any]:
    """Parse repeated `--set KEY=VALUE` into the types of the Reader's fields.

    Raises:
        DataError: Unknown keys, those given twice, and values of another type or with a name twice, all at once.
    """
    known = {option.name: option for option in options_of(format)}
    values: dict[str, Any] = {}
    problems = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            problems.append(f"--set {setting}: write KEY=VALUE")
        elif name not in known:
            problems.append(_unknown(format, name, known))
        elif name in values:
            problems.append(f"--set {name}: given twice; keep one of them{_listing(name, known[name])}")
        else:
            try:
                values[name] = _parse(text.strip(), known[name].type)
            except ValueError as e:
                problems.append(f"--set {setting}: {e}")
    if problems:
        raise DataError("\n".join(problems))
    return values


def as_record(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON values, without those at None."""

    def plain(value: Any) -> Any:
        if isinstance(value, str | int | float | bool):
            return value
        return [plain(v) for v in value] if isinstance(value, list | tuple | set | frozenset) else str(value)

    return {name: plain(value) for name, value in options.items() if value is not None}


def from_record(format: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `as_record`."""
    paths = {option.name for option in options_of(format) if "Path" in str(option.type)}

    def back(name: str, value: Any) -> Any:
        if name not in paths:
            return value
        return [Path(v) for v in value] if isinstance(value, list) else Path(value)

    return {name: back(name, value) for name, value in record.items()}


def type_text(annotation: Any) -> str:
    """A field's type as help text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else type_text(a) for a in arguments)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is not None and arguments:
        return f"list of {type_text(arguments[0])}"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}.get(
        annotation, str(annotation)
    )


def _unknown(format: str, name: str, known: Iterable[str]) -> str:
    return f"{name}: format {format} has no such option; {_suggest(name, known)}; see `stamo data formats {format}`"


def _suggest(word: str, known: Iterable[str]) -> str:
    known = [name for name in known if name not in COMMON]
    return did_you_mean(word, known) or f"there is: {', '.join(known) or 'none'}"


def _listing(name: str, option: Option) -> str:
    return f", several values with commas: {name}=A,B" if "list of" in type_text(option.type) else ""


def _parse(text: str, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _parse_any(text, arguments)
    if origin is Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise ValueError(f"must be one of {', '.join(map(str, arguments))}")
    if origin is not None and isinstance(origin, type) and issubclass(origin, (Sequence, set, frozenset)):
        items = [_parse(part.strip(), arguments[0]) for part in text.split(",") if part.strip()]
        names = [item for item in items if isinstance(item, str | Path)]
        if twice := [str(name) for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"{', '.join(twice)} given twice; name each once")
        return tuple(items) if origin is tuple else items
    if annotation is bool:
        if text.lower() not in _WORDS:
            raise ValueError("must be true or false")
        return _WORDS[text.lower()]
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise ValueError(f"must be a {type_text(annotation)}") from None
    if annotation in (str, Path, Any):
        return Path(text) if annotation is Path else text
    raise ValueError("cannot be given on the command line")


def _parse_any(text: str, choices: Sequence[Any]) -> Any:
    if type(None) in choices and text.lower() in ("none", "null", ""):
        return None
    problem = ValueError("has no value")
    for choice in choices:
        if choice is not type(None):
            try:
                return _parse(text, choice)
            except ValueError as e:
                problem = e
    raise problem


def _argument_docs(found: type) -> dict[str, str]:
    """Field → text of the docstring's section "Args:".

    Fields listed as `NAME, NAME: See BASE`, and those not listed, take their text from a base class.
    """
    docs: dict[str, str] = {}
    for described in found.__mro__:
        doc = inspect.cleandoc(described.__doc__ or "")
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.DOTALL | re.MULTILINE)
        for entry in re.split(r"\n(?= {4}\w)", section[1].rstrip()) if section else ():
            names, _, text = re.sub(r"\s+", " ", entry.strip()).partition(": ")
            for name in re.sub(r" \(.*?\)$", "", names).split(", "):
                if not docs.get(name):
                    docs[name] = "" if text.startswith("See `") else text
    return docs
