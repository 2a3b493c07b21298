"""Diffusion Policy's and UMI's ReplayBuffer in zarr, a folder or a .zarr.zip.

  data/KEY (N, …)            all episodes end to end: img or camera0_rgb (N, H, W, 3), state, action, robot0_eef_pos, …
  meta/episode_ends (E,)     where each episode ends

Layout: https://github.com/real-stanford/diffusion_policy/blob/main/diffusion_policy/common/replay_buffer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

import numpy as np

from data_tools.formats import remarks
from data_tools.formats.declared import (
    ActionOptions,
    Mode,
    declare,
    declared_problems,
    is_declared,
    settle_gripper,
    spec_notes,
    upright,
)
from data_tools.formats.rotations import pose_vectors
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Frames, Scan, chosen, columns
from data_tools.formats.zarr_buffer import (
    ENDS,
    OpenBuffer,
    check_codecs,
    find_buffers,
    is_buffer,
    is_picture,
    kept_open,
    open_buffer,
    pictures,
    read_ends,
    reading,
    unit_of,
)
from data_tools.formats.zarr_metadata import check_folder
from stamo_dist.errors import DataError

#: Usual keys of the proprioception; all that exist are taken.
PROPRIO = (
    "state",
    "agent_pos",
    "robot_eef_pose",
    "robot0_eef_pos",
    "robot0_eef_rot_axis_angle",
    "robot0_gripper_width",
)
UMI = ("robot0_eef_pos", "robot0_eef_rot_axis_angle", "robot0_gripper_width")
TIMES = "timestamp"
#: How to declare UMI's actions: an action is the pose of the next row.
UMI_HOW = (
    f"--set action={','.join(UMI)} --set action_at=next --set mode=absolute --set rotation=rotvec "
    f"--set gripper=0.08,0 --set pose={','.join(UMI[:2])}"
)
HOW = (
    "--set mode=other if they are targets or joints, else e.g. --set mode=delta --set rotation=rotvec --set gripper=1,0"
)
#: Upper bound on rows of a buffer, as they are enumerated in memory.
MOST_CHUNKS = 10_000_000


@dataclass
class ReplayBufferReader(ActionOptions):
    """Reads a ReplayBuffer of Diffusion Policy or UMI: a .zarr folder, a .zarr.zip, or a folder of them.

    Keys are names below `data`. data[t] holds what was seen and done at step t.

    Args:
        src: The .zarr folder or .zarr.zip, or a folder that is searched for them.
        cameras: Keys of the pictures, (N, H, W, 3); all such keys when omitted.
        action: Keys whose numbers, side by side, are the action; `action` when omitted; "none" for none.
        action_at: "now": actions[t] is in row t; "next": in row t + 1, as for UMI's poses; then the last frame has none
            and is dropped.
        proprio: Keys of the proprioception; state, agent_pos, robot_eef_pose and UMI's, where they exist, when omitted;
            "none" for none.
        mode: "delta", "absolute", "velocity" or "other" (kept as it is but for the gripper).
        rotation, metres, radians, gripper, gripper_dim: See `ActionOptions`.
        pose: Keys whose numbers, side by side, begin with the end effector's position and rotation; for absolute
            actions.
        pose_rotation: Its rotation; as `rotation` when omitted.
        rate_hz: Steps per second, for buffers without data/timestamp.
        instruction: Instruction of all episodes, as such buffers have none.
        image_orientation: See `ImageOptions`.
    """

    src: Path
    cameras: Sequence[str] | None = None
    action: Sequence[str] = ()  # default () instead of None, so that "none" is a value; likewise below
    action_at: Literal["now", "next"] = "now"
    proprio: Sequence[str] = ()
    mode: Mode | None = None
    pose: Sequence[str] = ()
    instruction: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_mark", uuid4().hex)  # unique: the file may change before another reader opens it

    def scan(self) -> Scan:
        src = Path(self.src)
        problems = self._check_options()
        if problems:
            raise DataError("\n".join(problems))
        found = find_buffers(src)
        episodes: list[EpisodeRef] = []
        seen: dict[_Settled, str] = {}  # property → the first buffer that has it
        notes: list[str] = []
        for path in found:
            try:
                check_folder(path)
                with open_buffer(path) as buffer:
                    data, ends = dict(buffer["data"].arrays()), read_ends(path, buffer)
                    settled = self._settle(path, data, ends, notes)
                    episodes += self._episodes(path, data, ends, settled)
                    seen.setdefault(settled, path.name)
            except DataError as e:
                problems.append(str(e))
        if len(seen) > 1:
            problems.append(f"keys, actions or rates differ: {', '.join(seen.values())}; convert them separately")
        if problems:
            raise DataError("\n".join(problems))
        common = next(iter(seen))
        notes += [*spec_notes(common.spec), *remarks.unsaid_instructions(episodes)]
        return Scan(
            episodes=episodes,
            files=[file for path in found for file in _files(path)],
            cameras=list(common.cameras),
            rate_hz=common.rate,
            action=common.spec,
            proprio_dim=common.size,
            options={
                "action": list(common.action),
                "action_at": self.action_at,
                "proprio": list(common.proprio),
                "pose": list(self.pose),
                "image_orientation": self.image_orientation,
            },
            notes=list(dict.fromkeys(notes)),
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        src = Path(self.src)
        path = src if is_buffer(src) else src / episode.file
        start, length = episode.private["start"], episode.length
        with reading(path, "data"):
            data = kept_open(path, self.__dict__["_mark"])
            shift = int(self.action_at == "next")
            times = np.arange(length) / episode.private["rate_hz"]
            if episode.private["timed"]:
                times = np.asarray(data[TIMES][start : start + length], np.float64).ravel()
            pose = columns(data, list(self.pose), length, start)
            return EpisodeData(
                frames={
                    camera: upright(_frames(data, camera, start), self.image_orientation)
                    for camera in episode.private["cameras"]
                },
                times=times - times[0],
                actions=settle_gripper(self, columns(data, episode.private["action"], length, start + shift)),
                proprio=columns(data, episode.private["proprio"], length, start),
                pose=pose_vectors(pose, self.pose_rotation or self.rotation or "rotvec") if self.pose else None,
            )

    def _check_options(self) -> list[str]:
        problems = declared_problems(self, self.mode, "mode")
        if self.action_at not in ("now", "next"):
            problems.append(f"action_at: {self.action_at!r} must be now or next")
        if self.mode in get_args(Mode) and self.mode != "other" and not is_declared(self):
            problems.append(f"mode: {self.mode} also needs rotation and gripper (OPEN,CLOSED or absent)")
        return problems

    def _settle(self, path: Path, data: Mapping[str, Any], ends: np.ndarray, notes: list[str]) -> _Settled:
        """The role of a buffer's keys.

        Raises:
            DataError: Keys are missing, or of the wrong shape.
        """
        keys, proprio = chosen(self.action, ("action",), data), chosen(self.proprio, PROPRIO, data)
        cameras = list(self.cameras or pictures(data))
        there = ", ".join(f"{k} {data[k].dtype} {data[k].shape}" for k in sorted(data)) or "nothing"
        if missing := [k for k in (*cameras, *keys, *proprio, *self.pose) if k not in data]:
            raise DataError(f"{path}: data has no {', '.join(missing)}; it has {there}")
        if wrong := [c for c in cameras if not is_picture(data[c])]:
            raise DataError(f"{path}: {', '.join(wrong)} are no pictures (N, H, W, 3); data has {there}")
        if not cameras:
            raise DataError(f"{path}: no key has pictures (N, H, W, 3); data has {there}")
        for key in (*cameras, *keys, *proprio, *self.pose):
            check_codecs(path, data[key])
        numeric = [k for k in sorted(data) if k not in cameras]
        if not keys and not self.action:
            umi = f"; UMI's is said with {UMI_HOW}" if all(k in data for k in UMI) else ""
            notes.append(
                f"action: no key action, so there are none; numeric keys are {', '.join(numeric)}; name them with "
                f"--set action=KEY,KEY, or say --set action=none{umi}"
            )
        if not proprio and not self.proprio:
            notes += remarks.no_proprio(numeric)
        for camera in cameras:
            if data[camera].dtype.kind == "f":
                with reading(path, f"data/{camera}"):
                    top = 255 / unit_of(data[camera])
                notes.append(f"cameras: {camera} is stored as floats, read as 0 to {top:g} by its first frames")
        for key in (*cameras, *keys, *proprio, *self.pose):
            if data[key].nchunks > MOST_CHUNKS:
                raise DataError(f"{path}: data/{key}, shape: {data[key].shape} would be {data[key].nchunks} chunks")
            with reading(path, f"data/{key}"):
                lost = data[key].nchunks - data[key].nchunks_initialized
            if lost:
                notes.append(f"{path.name}: {lost} chunks of {key} are not stored, and read as their fill value")
            if 0 in data[key].shape[1:] or (key not in cameras and data[key].dtype.kind not in "fiub"):
                raise DataError(
                    f"{path}: data/{key}, shape and dtype: {data[key].shape} {data[key].dtype} holds no numbers"
                )
        spec = self._spec(path, data, keys)
        size = sum(int(np.prod(data[k].shape[1:])) for k in proprio)
        return _Settled(tuple(cameras), tuple(keys), spec, tuple(proprio), size, self._rate(path, data, ends))

    def _spec(self, path: Path, data: Mapping[str, Any], keys: Sequence[str]) -> ActionSpec | None:
        if not keys:
            return None
        dim = sum(int(np.prod(data[k].shape[1:])) for k in keys)
        name = " + ".join(keys)
        if is_declared(self):
            try:
                return declare(self, self.mode, name, dim)
            except DataError as e:
                raise DataError(f"{path}: {e}") from e
        return ActionSpec(dim, f"{name}: {dim} numbers as stored", "other", unstated="" if self.mode else HOW)

    def _rate(self, path: Path, data: Mapping[str, Any], ends: np.ndarray) -> float:
        if self.rate_hz is not None:
            return float(self.rate_hz)
        if TIMES not in data:
            raise DataError(f"{path}: no data/{TIMES}; give the steps per second with --set rate_hz=HZ")
        with reading(path, f"data/{TIMES}"):
            first = np.asarray(data[TIMES][: ends[0]], np.float64).ravel()
        steps = np.diff(first)
        if not len(steps) or not np.isfinite(steps).all() or (steps <= 0).any():
            raise DataError(f"{path}: data/{TIMES} does not increase in the first episode; give --set rate_hz=HZ")
        return round(1 / float(np.median(steps)), 3)

    def _episodes(
        self, path: Path, data: Mapping[str, Any], ends: np.ndarray, settled: _Settled
    ) -> Iterator[EpisodeRef]:
        for key in (*settled.cameras, *settled.action, *settled.proprio, *self.pose):
            if (rows := data[key].shape[0]) < ends[-1]:
                raise DataError(f"{path}: data/{key} has {rows} rows; {ENDS} needs {ends[-1]}")
        src = Path(self.src)
        alone = is_buffer(src)
        name = path.name.removesuffix(".zip").removesuffix(".zarr")
        stem = name if alone else path.relative_to(src).with_name(name).as_posix()
        shift = int(self.action_at == "next" and bool(settled.action))
        timed = self.rate_hz is None and TIMES in data
        for k, (start, end) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)):
            yield EpisodeRef(
                id=f"{stem}/episode_{k:06d}",
                file=path.name if alone else path.relative_to(src).as_posix(),
                key=str(k),
                length=end - start - shift,
                task=name,
                instruction=self.instruction or "",
                private={
                    "start": start,
                    "rate_hz": settled.rate,
                    "timed": timed,
                    "cameras": settled.cameras,
                    "action": settled.action,
                    "proprio": settled.proprio,
                },
            )


@dataclass(frozen=True)
class _Settled:
    """The roles of a buffer's keys; `size`: dimensions of the proprioception."""

    cameras: tuple[str, ...]
    action: tuple[str, ...]
    spec: ActionSpec | None
    proprio: tuple[str, ...]
    size: int
    rate: float


def _frames(data: OpenBuffer, key: str, start: int) -> Frames:
    """Frames of the episode that begins at row `start`, as uint8."""

    def frames(indices: Sequence[int]) -> Iterator[np.ndarray]:
        with reading(data.path, f"data/{key}"):
            yield from data.frames(key, [start + i for i in indices])

    return frames


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
