"""Assigning roles to a bag's topics, and reading their messages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats import rosbag_files
from data_tools.formats.remarks import looks_like_language, no_proprio
from data_tools.formats.rosbag_files import JOINTS, STRING, MessageField, parse_field
from data_tools.formats.rosbag_images import TYPES, image_fault
from stamo_dist.errors import DataError

#: Suffix that image_transport gives to the JPEG version of an image topic.
TWIN = "/compressed"
#: Messages of each topic that a scan reads.
HEADS = 100


@dataclass(kw_only=True)
class TopicOptions:
    """Options that assign roles to topics.

    Args:
        cameras: Topics of pictures, or their names (/cam/image is cam_image); all that are RGB or grey when omitted.
        action: FIELDs whose numbers, side by side, are the action; none when omitted.
        proprio: FIELDs of the proprioception; the joint positions when omitted, where one topic has them; "none" for
            none.
        clock: The camera whose messages are the frames; the first one when omitted.
        instruction: The instruction, if no topic has it.
        instruction_topic: FIELD of a text with the instruction, valid from its message on.
        pose: FIELDs whose numbers, side by side, begin with the end effector's position and rotation; for absolute
            actions.
    """

    cameras: Sequence[str] | None = None
    action: Sequence[str] = ()
    proprio: Sequence[str] = ()  # default () instead of None, so that "none" is a value
    pose: Sequence[str] = ()
    clock: str | None = None
    instruction: str | None = None
    instruction_topic: str | None = None


@dataclass(frozen=True)
class Topics:
    """The roles of topics: cameras by name, the camera used as clock, and fields with numbers and with a text."""

    cameras: Mapping[str, str]
    clock: str
    action: tuple[MessageField, ...]
    proprio: tuple[MessageField, ...]
    pose: tuple[MessageField, ...]
    text: MessageField | None

    @property
    def numeric(self) -> list[str]:
        """Topics with numbers."""
        return list(dict.fromkeys(field.topic for field in (*self.action, *self.proprio, *self.pose)))

    @property
    def spoken(self) -> list[str]:
        """The topic of the instruction, if there is one."""
        return [self.text.topic] if self.text else []


def resolve_topics(path: Path, bag: Any, asked: TopicOptions, notes: list[str]) -> Topics:
    """Assign roles to a bag's topics; those left out are reported in `notes`.

    Raises:
        DataError: A requested topic is missing, or no topic has images.
    """
    there = rosbag_files.topics(bag)
    cameras = _cameras(path, bag, asked, there, notes)
    action, pose = ([parse_field(text) for text in texts] for texts in (asked.action, asked.pose))
    joints = [topic for topic, kind in there.items() if kind == JOINTS]
    if asked.proprio:
        proprio = [] if list(asked.proprio) == ["none"] else [parse_field(text) for text in asked.proprio]
    else:
        proprio = [MessageField(joints[0], ("position",))] if len(joints) == 1 else []
    others = [f"{topic} ({kind})" for topic, kind in sorted(there.items()) if kind not in (*TYPES, STRING)]
    if not proprio and not asked.proprio:
        notes += no_proprio(others)
    if not action:
        notes.append(
            f"action: none was asked for, so there are none; other topics are: {', '.join(others) or 'none'}; name "
            "them with --set action=/TOPIC.FIELD"
        )
    texts = [topic for topic, kind in there.items() if kind == STRING]
    like = [topic for topic in texts if looks_like_language(topic)] or texts
    if asked.instruction_topic is None and asked.instruction is None and like:
        notes.append(
            f"instruction: these topics have texts: {', '.join(sorted(like))}; take one with "
            "--set instruction_topic=/TOPIC"
        )
    text = None if asked.instruction_topic is None else parse_field(asked.instruction_topic)
    if text is not None and not text.path:
        text = MessageField(text.topic, ("data",))
    clock = _named(asked.clock, cameras) if asked.clock else next(iter(cameras))
    if clock not in cameras:
        raise DataError(f"{path}: clock: {asked.clock} is no camera; there is {', '.join(cameras)}")
    settled = Topics(cameras, cameras[clock], tuple(action), tuple(proprio), tuple(pose), text)
    rosbag_files.check_topics(path, bag, [*settled.numeric, *settled.spoken])
    return settled


def camera_name(topic: str) -> str:
    """A camera's name: the topic with _ for /."""
    return topic.strip("/").replace("/", "_")


def _named(camera: str, cameras: Mapping[str, str]) -> str:
    """The name of a camera given by name or topic."""
    return camera if camera in cameras else camera_name(camera)


def _cameras(path: Path, bag: Any, asked: TopicOptions, there: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """Name → topic."""
    pictures = {topic: camera_name(topic) for topic in sorted(there) if there[topic] in TYPES}
    rosbag_files.check_topics(path, bag, list(pictures))
    faults = {topic: image_fault(rosbag_files.first_message(bag, topic)) for topic in pictures}
    usable = {name: topic for topic, name in pictures.items() if not faults[topic]}
    if asked.cameras:
        names = [_named(camera, usable) for camera in asked.cameras]
        if lost := [camera for camera, name in zip(asked.cameras, names, strict=True) if name not in usable]:
            listed = ", ".join(f"{topic} ({fault})" if fault else topic for topic, fault in faults.items()) or "none"
            raise DataError(f"{path}: no camera {', '.join(lost)}; topics with pictures are: {listed}")
        return {name: usable[name] for name in names}
    twins = [topic for topic in usable.values() if topic.removesuffix(TWIN) in set(usable.values()) - {topic}]
    notes += [f"cameras: {topic} left out: {fault}" for topic, fault in faults.items() if fault]
    notes += [f"cameras: {topic} left out: {topic.removesuffix(TWIN)} has the same pictures" for topic in twins]
    cameras = {name: topic for name, topic in usable.items() if topic not in twins}
    if not cameras:
        listed = ", ".join(f"{topic} ({kind})" for topic, kind in sorted(there.items())) or "no messages"
        raise DataError(f"{path}: no topic has RGB or grey pictures; it has {listed}")
    return cameras


@dataclass(frozen=True)
class Recorded:
    """A bag's messages: times by topic, int64 (N,) in ns, and the content of topics that are not cameras."""

    times: dict[str, np.ndarray]
    contents: dict[str, list[Any]]

    def numbers(self, fields: Sequence[MessageField], rows: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        """(T, D): the concatenated numbers of these fields in the messages `rows` (T,) of each topic.

        Raises:
            DataError: A field is missing, or its number of values changes.
        """
        parts = [self._column(field, rows[field.topic]) for field in fields]
        return np.concatenate(parts, axis=1) if parts else np.zeros((length, 0), np.float32)

    def _column(self, field: MessageField, rows: np.ndarray) -> np.ndarray:
        held, where = np.unique(rows, return_inverse=True)
        messages = [self.contents[field.topic][row] for row in held.tolist()]
        values = [rosbag_files.numbers(message, field) for message in messages]
        for value in values:
            if len(value) != len(values[0]):
                raise DataError(f"{field}: has {len(values[0])} numbers, then {len(value)}")
        return np.stack(values)[where.reshape(-1)]

    def texts(self, field: MessageField) -> list[str]:
        """The texts of all messages.

        Raises:
            DataError: There is no such field, or it is not a string.
        """
        found = [rosbag_files.reach(message, field) for message in self.contents[field.topic]]
        if wrong := [text for text in found if not isinstance(text, str)]:
            raise DataError(f"{field}: {type(wrong[0]).__name__}, no text")
        return [text.strip() for text in found]


def _check_joints(topic: str, messages: Sequence[Any]) -> None:
    """Raises:
    DataError: A message names other joints than the first one.
    """
    names = [list(getattr(message, "name", ())) for message in messages]
    if other := next((found for found in names if found != names[0]), None):
        raise DataError(
            f"{topic}: its messages name {', '.join(names[0])}, then {', '.join(other)}: more than one thing speaks on "
            "it; record them as topics of their own"
        )


def record(bag: Any, topics: Topics, stamps: str, heads: bool = False) -> Recorded:
    """Times of all topics, and the messages of topics that are not cameras; with `heads` only the first few.

    Raises:
        DataError: Header times are requested and a topic has none, or they decrease.
    """
    cameras = set(topics.cameras.values())
    times: dict[str, list[int]] = defaultdict(list)
    contents: dict[str, list[Any]] = defaultdict(list)
    there = rosbag_files.topics(bag)
    wanted = list(dict.fromkeys([*cameras, *topics.numeric, *topics.spoken]))
    for topic, received, content, kind in rosbag_files.messages(bag, wanted):
        at: int | None = received
        if stamps == "header" and topic not in topics.spoken:
            at = rosbag_files.stamp(bag, content, kind)
        if at is None:
            raise DataError(f"{topic}: its messages ({kind}) have no header; give --set stamps=received")
        if times[topic] and at < times[topic][-1]:
            raise DataError(f"{topic}: the time of message {len(times[topic])} goes back; give --set stamps=received")
        times[topic].append(at)
        if topic not in cameras and (not heads or len(contents[topic]) < HEADS or topic in topics.spoken):
            contents[topic].append(bag.deserialize(content, kind))
    for topic in topics.numeric:
        if there[topic] == JOINTS:
            _check_joints(topic, contents[topic])
    return Recorded({topic: np.asarray(times[topic], np.int64) for topic in wanted}, dict(contents))
