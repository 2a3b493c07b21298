"""ROS bags: topics become cameras, actions and proprioception, on the clock of one camera.

A camera's messages are the frames. Each is paired with the latest message, at or before it, of every other topic:
what a robot could have known at that time. Times are those of recording, or of the messages' headers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from data_tools.formats import remarks, rosbag_files
from data_tools.formats.declared import (
    ActionOptions,
    Mode,
    declare,
    declared_problems,
    is_declared,
    not_one_of,
    settle_gripper,
    spec_notes,
    upright,
)
from data_tools.formats.hdf5 import Agreement
from data_tools.formats.rosbag_clock import Paired, latest, pair, period
from data_tools.formats.rosbag_files import MessageField, open_bag
from data_tools.formats.rosbag_images import picture
from data_tools.formats.rosbag_topics import Recorded, TopicOptions, Topics, record, resolve_topics
from data_tools.formats.rotations import ROTATION_SIZE, pose_vectors
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Frames, Scan
from stamo_dist.errors import DataError

HOW = (
    "--set mode=other if they are targets or joints, else e.g. --set mode=velocity --set rotation=rotvec "
    "--set gripper=absent"
)


@dataclass
class RosbagReader(TopicOptions, ActionOptions):
    """Reads bags: ROS 1's .bag, MCAP, rosbag2's folders and .db3; each is an episode.

    A FIELD is a topic, or a topic and a path in its messages: /cmd_vel (all its numbers), /joint_states.position,
    /poses.poses.0.position.

    Args:
        src: A bag, or a folder that is searched for them.
        cameras, action: See `TopicOptions`.
        action_at: "now": the latest command at a frame; "next": that at the next frame, issued after this one; then
            the last frame has none and is dropped.
        proprio, clock: See `TopicOptions`.
        max_age: Maximum age (s) of a message at a frame; when omitted two periods of its topic, or of the clock if
            that is slower.
        stamps: "received": times at which messages were recorded; "header": those in their headers.
        instruction, instruction_topic: See `TopicOptions`.
        definitions: Folder of PACKAGE/msg/TYPE.msg, for types that bags do not define.
        mode: "delta", "absolute", "velocity" or "other" (kept as it is but for the gripper).
        rotation, metres, radians, gripper, gripper_dim: See `ActionOptions`.
        pose: See `TopicOptions`.
        pose_rotation: Rotation of the pose; quat_xyzw, ROS's order, when omitted.
        rate_hz: Frames per second for the manifest; the clock's median rate when omitted.
        image_orientation: See `ImageOptions`.
    """

    src: Path
    action_at: Literal["now", "next"] = "now"
    max_age: float | None = None
    stamps: Literal["received", "header"] = "received"
    definitions: Path | None = None
    mode: Mode | None = None

    def scan(self) -> Scan:
        if problems := self._check_options():
            raise DataError("\n".join(problems))
        src = Path(self.src)
        found = rosbag_files.find_bags(src)
        episodes: list[EpisodeRef] = []
        bad: list[str] = []
        notes: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        periods: list[float] = []
        agreement = Agreement()
        for path in found:
            said: list[str] = []
            try:
                with open_bag(path, self.definitions) as bag:
                    topics = resolve_topics(path, bag, self, said)
                    recorded = record(bag, topics, self.stamps, heads=True)
                paired = self._paired(recorded, topics)
                reference = self._reference(path, topics, recorded, paired)
                agreement.note(reference.id, self._dimensions(topics, recorded))
            except DataError as e:
                bad.append(f"{_id(src, path)}: {str(e).removeprefix(f'{path}: ')}")
                continue
            episodes.append(reference)
            periods.append(period(paired.times))
            notes.update(said)
            dropped.update(early=paired.early, late=paired.late, bags=int(paired.early + paired.late > 0))
        if problems := agreement.problems() if episodes else [f"{src}: no bag can be used; {bad[0]}"]:
            raise DataError("\n".join(problems))
        return Scan(
            episodes=episodes,
            files=[file for path in found for file in rosbag_files.bag_files(path)],
            cameras=list(agreement["cameras"]),
            rate_hz=float(self.rate_hz or round(1 / (float(np.median(periods)) or 1.0), 2)),
            action=agreement["actions"],
            proprio_dim=agreement["proprio dimensions"],
            options={
                "action": list(self.action),
                "action_at": self.action_at,
                "proprio": list(self.proprio),
                "pose": list(self.pose),
                "clock": self.clock,
                "max_age": self.max_age,
                "stamps": self.stamps,
                "instruction_topic": self.instruction_topic,
                "image_orientation": self.image_orientation,
            },
            bad=bad,
            notes=[
                *(note if n == len(episodes) else f"{note} ({n} of {len(episodes)} bags)" for note, n in notes.items()),
                *_said(dropped, len(episodes)),
                *spec_notes(agreement["actions"]),
                *remarks.unsaid_instructions(episodes),
            ],
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        path = Path(self.src) / episode.file
        with open_bag(path, self.definitions) as bag:
            topics = resolve_topics(path, bag, self, [])
            recorded = record(bag, topics, self.stamps)
        paired = self._paired(recorded, topics)
        length = episode.length
        now = {topic: row[:length] for topic, row in paired.rows.items()}
        acting = {topic: row[1:] for topic, row in paired.rows.items()} if self._shift(topics) else now
        pose = recorded.numbers(topics.pose, now, length)
        times = paired.times[:length]
        return EpisodeData(
            frames={
                name: upright(_frames(path, topic, now[topic], self.definitions), self.image_orientation)
                for name, topic in topics.cameras.items()
            },
            times=(times - times[0]) / 1e9,
            actions=settle_gripper(self, recorded.numbers(topics.action, acting, length)),
            proprio=recorded.numbers(topics.proprio, now, length),
            pose=pose_vectors(pose, self.pose_rotation or "quat_xyzw") if topics.pose else None,
            instructions=_instructions(recorded, topics.text, times) if topics.text else None,
        )

    def _check_options(self) -> list[str]:
        problems = declared_problems(self, self.mode, "mode")
        problems += not_one_of(("now", "next"), action_at=self.action_at)
        problems += not_one_of(("received", "header"), stamps=self.stamps)
        if self.mode in get_args(Mode) and self.mode != "other" and not is_declared(self):
            problems.append(f"mode: {self.mode} also needs rotation and gripper (OPEN,CLOSED or absent)")
        if self.max_age is not None and not self.max_age >= 0:
            problems.append(f"max_age: {self.max_age} must not be negative")
        return problems

    def _paired(self, recorded: Recorded, topics: Topics) -> Paired:
        """Raises:
        DataError: A message is too old, or no frames are left.
        """
        times = {topic: values for topic, values in recorded.times.items() if topic not in topics.spoken}
        paired = pair(times, topics.clock, self.max_age)
        if len(paired.times) <= self._shift(topics):
            raise DataError("only one frame is left, and action_at=next needs the next one")
        return paired

    def _shift(self, topics: Topics) -> int:
        """Number of frames at the end that have no action."""
        return int(self.action_at == "next" and bool(topics.action))

    def _reference(self, path: Path, topics: Topics, recorded: Recorded, paired: Paired) -> EpisodeRef:
        src = Path(self.src)
        length = len(paired.times) - self._shift(topics)
        told = _instructions(recorded, topics.text, paired.times[:length]) if topics.text else []
        return EpisodeRef(
            id=_id(src, path),
            file="" if path == src else path.relative_to(src).as_posix(),
            key="",
            length=length,
            task=path.resolve().parent.name,
            instruction=next((text for text in told if text), self.instruction or ""),
        )

    def _dimensions(self, topics: Topics, recorded: Recorded) -> dict[str, Any]:
        """Properties that must be equal in all bags, from the first message of each topic.

        Raises:
            DataError: A field is missing, or the action does not fit its declaration.
        """
        first = {topic: np.zeros(1, np.int64) for topic in topics.numeric}
        action, proprio, pose = (
            recorded.numbers(fields, first, 1).shape[1] for fields in (topics.action, topics.proprio, topics.pose)
        )
        if topics.pose and pose < 3 + ROTATION_SIZE[self.pose_rotation or "quat_xyzw"]:
            raise DataError(f"pose: {pose} numbers, too few for a position and pose_rotation")
        return {
            "cameras": tuple(topics.cameras),
            "actions": self._spec(" + ".join(map(str, topics.action)), action) if topics.action else None,
            "proprio dimensions": proprio,
        }

    def _spec(self, name: str, dim: int) -> ActionSpec:
        if is_declared(self):
            return declare(self, self.mode, name, dim)
        return ActionSpec(dim, f"{name}: {dim} numbers as recorded", "other", unstated="" if self.mode else HOW)


def _id(src: Path, path: Path) -> str:
    """A bag's episode id: its path below `src`, without suffix."""
    named = path.with_suffix("") if path.suffix in rosbag_files.SUFFIXES else path
    return named.name if path == src else named.relative_to(src).as_posix()


def _said(dropped: Counter[str], bags: int) -> list[str]:
    """Notes on frames dropped because a topic had no message yet, or no recent one at the end."""
    if not dropped["bags"]:
        return []
    return [
        f"frames: {dropped['early']} before every topic had spoken and {dropped['late']} after one had fallen silent "
        f"are left out, in {dropped['bags']} of {bags} bags"
    ]


def _instructions(recorded: Recorded, field: MessageField, times: np.ndarray) -> list[str]:
    """The latest text at each of `times` (T,), ns; "" before the first."""
    texts = ["", *recorded.texts(field)]
    return [texts[row + 1] for row in latest(recorded.times[field.topic], times).tolist()]


def _frames(path: Path, topic: str, rows: np.ndarray, definitions: Path | None) -> Frames:
    """Frames of a camera: frame t is the topic's message `rows[t]`."""

    def frames(indices: Sequence[int]) -> Iterator[np.ndarray | bytes]:
        with open_bag(path, definitions) as bag:
            stored = enumerate(rosbag_files.messages(bag, [topic]))
            number, image = -1, None
            for row in rows[list(indices)].tolist():
                while number < row:
                    number, (_, _, content, kind) = next(stored)
                    image = None
                if image is None:
                    image = picture(bag.deserialize(content, kind))
                yield image

    return frames
