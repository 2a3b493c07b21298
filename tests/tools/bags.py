"""Real bags, by rosbags' own writers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

#: What bags there are: name → how it is written.
KINDS = ("sqlite3", "mcap", "ros1")
#: Topic, time in s, message.
Said = tuple[str, float, Any]


class Words:
    """Makes messages of one version of ROS."""

    def __init__(self, kind: str = "mcap"):
        self.ros1 = kind == "ros1"
        self.store = get_typestore(Stores.ROS1_NOETIC if self.ros1 else Stores.ROS2_HUMBLE)

    def make(self, name: str, *values: Any) -> Any:
        return self.store.types[name](*values)

    def header(self, seconds: float) -> Any:
        time = self.make("builtin_interfaces/msg/Time", int(seconds), round(seconds % 1 * 1e9))
        return self.make("std_msgs/msg/Header", *([0] if self.ros1 else []), time, "frame")

    def image(self, pixels: np.ndarray, encoding: str = "rgb8", pad: int = 0, seconds: float = 0) -> Any:
        rows = pixels.reshape(len(pixels), -1).view(np.uint8)
        rows = np.pad(rows, ((0, 0), (0, pad)))
        return self.make(
            "sensor_msgs/msg/Image", self.header(seconds), *pixels.shape[:2], encoding, 0, rows.shape[1], rows.ravel()
        )

    def compressed(self, content: bytes, format: str = "jpeg") -> Any:
        return self.make(
            "sensor_msgs/msg/CompressedImage", self.header(0), format, np.frombuffer(content, np.uint8).copy()
        )

    def joints(self, position: Sequence[float], names: Sequence[str] = (), seconds: float = 0) -> Any:
        empty = np.zeros(0)
        named = list(names) or [f"j{k}" for k in range(len(position))]
        return self.make(
            "sensor_msgs/msg/JointState", self.header(seconds), named, np.asarray(position, float), empty, empty
        )

    def twist(self, *values: float) -> Any:
        vectors = [self.make("geometry_msgs/msg/Vector3", *values[k : k + 3]) for k in (0, 3)]
        return self.make("geometry_msgs/msg/Twist", *vectors)

    def pose(self, *values: float) -> Any:
        place = self.make("geometry_msgs/msg/Point", *values[:3])
        turn = self.make("geometry_msgs/msg/Quaternion", *values[3:])
        return self.make(
            "geometry_msgs/msg/PoseStamped", self.header(0), self.make("geometry_msgs/msg/Pose", place, turn)
        )

    def text(self, words: str) -> Any:
        return self.make("std_msgs/msg/String", words)


def write_bag(
    path: Path,
    kind: str,
    said: Sequence[Said],
    words: Words,
    version: int = 9,
    more: Sequence[tuple[str, str, str]] = (),
) -> Path:
    """A bag of these messages at `path`: a folder, or a .bag; `more`: topics with a type and its definition."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "ros1":
        writer: Any = Writer1(path)
        serialize = words.store.serialize_ros1
    else:
        plugin = StoragePlugin.MCAP if kind == "mcap" else StoragePlugin.SQLITE3
        writer = Writer(path, version=version, storage_plugin=plugin)
        serialize = words.store.serialize_cdr
    with writer:
        connections: dict[str, Any] = {}
        for topic, name, text in more:
            writer.write(writer.add_connection(topic, name, msgdef=text, rihs01="x"), round(said[0][1] * 1e9), b"")
        for topic, seconds, message in sorted(said, key=lambda entry: entry[1]):
            type_ = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, type_, typestore=words.store)
            writer.write(connections[topic], round(seconds * 1e9), bytes(serialize(message, type_)))
    return path
