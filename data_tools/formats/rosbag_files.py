"""Bags as files: finding and opening them, their topics, and the numbers in a message.

Read by the package rosbags: ROS 1's .bag, rosbag2's folders, .mcap and .db3. ROS 1, MCAP and newer rosbag2 define their
message types in the bag; else the types of ROS 2 Humble apply, and custom types come from a folder of .msg files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.source import check_lfs, find_files, walk
from stamo_dist.errors import DataError
from stamo_dist.extras import how_to_install

SUFFIXES = (".bag", ".mcap", ".db3")
METADATA = "metadata.yaml"
STRING = "std_msgs/msg/String"
JOINTS = "sensor_msgs/msg/JointState"
#: Nested message types that hold no robot data (times, headers).
_UNMEASURED = ("std_msgs/msg/Header", "builtin_interfaces/msg/Time", "builtin_interfaces/msg/Duration")


@dataclass(frozen=True)
class MessageField:
    """A topic, and a path to numbers or a text in its messages: field names, list indices; () is the whole message."""

    topic: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.topic, *self.path))


def parse_field(text: str) -> MessageField:
    """ "/joint_states.position" or "/poses.poses.0.position" or "/cmd_vel"."""
    topic, *path = text.strip().split(".")
    return MessageField(topic if topic.startswith("/") else f"/{topic}", tuple(path))


def find_bags(src: Path) -> list[Path]:
    """`src` itself, or the bags below it: folders with metadata.yaml count as one.

    Raises:
        DataError: There is none, or one is a Git LFS pointer.
    """
    if (src / METADATA).is_file():
        return [src]
    if src.is_file():
        return find_files(src, SUFFIXES)
    folders = sorted(path.parent for path in walk(src) if path.name == METADATA)
    try:
        loose = [path for path in find_files(src, SUFFIXES) if path.parent not in folders]
    except DataError:
        if not folders:
            raise
        loose = []
    return sorted([*folders, *loose])


def bag_files(path: Path) -> list[Path]:
    """The files of a bag."""
    return [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (*SUFFIXES, ".yaml", ".zstd"))


@contextmanager
def open_bag(path: Path, definitions: Path | None = None) -> Iterator[Any]:
    """A bag open for reading, as rosbags' AnyReader.

    Args:
        path: File or folder.
        definitions: Folder of PACKAGE/msg/TYPE.msg, for types that the bag does not define.

    Raises:
        DataError: rosbags is not installed, or the bag is damaged where it was read.
    """
    try:
        from rosbags.highlevel import AnyReader
        from rosbags.typesys import Stores, get_typestore
    except ImportError as e:
        raise DataError(f"reading bags needs the package rosbags; {how_to_install('ros')}") from e
    for file in bag_files(path):
        check_lfs(file)
    try:
        with AnyReader([path], default_typestore=get_typestore(Stores.ROS2_HUMBLE)) as bag:
            if definitions is not None:
                types = _definitions(definitions)
                bag.typestore.register({k: v for k, v in types.items() if k not in bag.typestore.fielddefs})
            yield bag
    except DataError:
        raise
    except Exception as e:  # storage plugins, codecs and parsers each raise their own exceptions
        said = " ".join(str(e).split()) or type(e).__name__
        raise DataError(f"{path}: not a whole bag ({said})") from e


def _definitions(folder: Path) -> dict[str, Any]:
    """The types that the .msg files below a folder define.

    Raises:
        DataError: There is none, or one cannot be read.
    """
    from rosbags.typesys import TypesysError, get_types_from_msg

    types: dict[str, Any] = {}
    for path in find_files(folder, (".msg",)):
        package = path.parent.parent.name if path.parent.name == "msg" else path.parent.name
        try:
            types.update(get_types_from_msg(path.read_text(), f"{package}/msg/{path.stem}"))
        except (TypesysError, UnicodeDecodeError) as e:
            raise DataError(f"{path}: no message definition ({e})") from e
    return types


def topics(bag: Any) -> dict[str, str]:
    """Topic → message type, for topics with messages."""
    return {connection.topic: connection.msgtype for connection in bag.connections if connection.msgcount}


def check_topics(path: Path, bag: Any, wanted: Sequence[str]) -> None:
    """Raises:
    DataError: A topic is missing, or its type is not defined.
    """
    there = topics(bag)
    if lost := [topic for topic in wanted if topic not in there]:
        listed = ", ".join(f"{topic} ({kind})" for topic, kind in sorted(there.items())) or "nothing"
        raise DataError(f"{path}: no messages of {', '.join(dict.fromkeys(lost))}; it has {listed}")
    for topic in wanted:
        if there[topic] not in bag.typestore.fielddefs:
            raise DataError(
                f"{path}: {topic}: the bag does not define its type {there[topic]}; give the folder of its .msg files "
                "with --set definitions=FOLDER"
            )


def messages(bag: Any, wanted: Sequence[str]) -> Iterator[tuple[str, int, bytes, str]]:
    """Topic, time in ns when it was recorded, bytes and type of the messages of these topics, in order."""
    connections = [connection for connection in bag.connections if connection.topic in wanted]
    if connections:
        for connection, time, content in bag.messages(connections):
            yield connection.topic, time, content, connection.msgtype


def first_message(bag: Any, topic: str) -> Any:
    """The first message of a topic, which must have messages."""
    for _, _, content, kind in messages(bag, [topic]):
        return bag.deserialize(content, kind)
    raise DataError(f"{topic} has no messages, though the bag counts some")


def stamp(bag: Any, content: bytes, kind: str) -> int | None:
    """The time in a message's header (ns); None if it has no header."""
    fields = bag.typestore.fielddefs[kind][1]
    if not fields or fields[0][1][1] != "std_msgs/msg/Header":
        return None
    # Skip 4 bytes: in ROS 2 the byte-order mark, in ROS 1 the header's sequence number.
    order = "<" if not bag.is2 or content[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", content, 4)
    return seconds * 10**9 + nanoseconds


def numbers(message: Any, field: MessageField) -> np.ndarray:
    """float64 (D,): the numbers of a field, in the order of the message's definition, without headers and times.

    Raises:
        DataError: There is no such field, or it has no number.
    """
    found: list[float] = []
    _collect(reach(message, field), found)
    if not found:
        raise DataError(f"{field}: no numbers in it; it has {fields_of(message)}")
    return np.asarray(found, np.float64)


def reach(message: Any, field: MessageField) -> Any:
    """The value of a field.

    Raises:
        DataError: There is no such field.
    """
    value = message
    for part in field.path:
        try:
            value = value[int(part)] if part.isdigit() else getattr(value, part)
        except (AttributeError, IndexError, TypeError):
            raise DataError(f"{field}: no {part} in its messages; they have {fields_of(message)}") from None
    return value


def fields_of(message: Any) -> str:
    """The fields of a message, for error messages."""
    return ", ".join(getattr(message, "__dataclass_fields__", {})) or "nothing"


def _collect(value: Any, found: list[float]) -> None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        found.extend(value.ravel().tolist())
    elif isinstance(value, (bool, int, float)):
        found.append(float(value))
    elif isinstance(value, (list, np.ndarray)):
        for item in value:
            _collect(item, found)
    elif hasattr(value, "__dataclass_fields__") and value.__msgtype__ not in _UNMEASURED:
        for name in value.__dataclass_fields__:
            if name != "__msgtype__":
                _collect(getattr(value, name), found)
