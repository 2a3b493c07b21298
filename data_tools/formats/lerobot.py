"""LeRobotDataset v2.1 and v3.0 as written by LeRobot: parquet for numbers, mp4 (or images in parquet) for cameras.

Frame t is paired with the state at t and the action taken at t. What the numbers of an action mean is nowhere in the
files, so the user says it (`action_kind`); unsaid, actions are kept as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.formats.lerobot_files import Listed, find_layout, parquet_file, read_columns, read_info
from data_tools.formats.libero import OSC_POSE
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Frames, Scan
from stamo_dist.errors import DataError

#: Known action conventions by `action_kind`.
ACTIONS = {
    "libero": OSC_POSE,
    "bridge": ActionSpec(
        dim=7,
        text="end-effector delta: dx dy dz (m), droll dpitch dyaw (rad), gripper 1 open 0 close",
        mode="delta",
        translation=(0, 1, 2),
        rotation=(3, 4, 5),
        rotation_kind="euler_xyz",
        gripper=6,
    ),
}
#: The shortest prefix that tells a camera's name from its feature's.
_PREFIXES = ("observation.images.", "observation.")
#: Frames whose stored time is this close to their number / fps have exactly that time; the stored one is float32.
_TIME_TOLERANCE = 1e-3


@dataclass
class LerobotReader:
    """Reads a LeRobotDataset's folder, the one with `meta`, `data` and `videos`.

    Args:
        src: The dataset's folder.
        cameras: Cameras to convert, by feature (observation.images.front) or in short (front); all when omitted. Depth
            maps are left out.
        action_kind: What `action` means: "libero" (OSC_POSE deltas), "bridge" (deltas in m and rad, gripper 1 open), or
            "other" (joints, or anything else): kept as stored.
        action: Feature with the actions; a dataset without it gives a source without actions.
        state: Feature with the proprioception; none gives proprio of dimension 0.
        gripper: With action_kind "other": which number of the action is the gripper's, from 0; none when omitted.
        gripper_open: With `gripper`: its value when open.
        gripper_closed: With `gripper`: its value when closed.
    """

    src: Path
    cameras: Sequence[str] | None = None
    action_kind: Literal["other", "libero", "bridge"] = "other"
    action: str = "action"
    state: str = "observation.state"
    gripper: int | None = None
    gripper_open: float = 1.0
    gripper_closed: float = 0.0

    def scan(self) -> Scan:
        info = read_info(self.src)
        features = info["features"]
        problems: list[str] = []
        chosen = self._chosen(features, problems)
        spec = self._action_spec(features, problems)
        if problems:
            raise DataError("\n".join(problems))
        layout = find_layout(self.src, [f for f in chosen.values() if features[f]["dtype"] == "video"])
        splits = _splits(info)
        episodes: list[EpisodeRef] = []
        bad: list[str] = []
        sizes = {name: _size(features, name) for name in (self.action, self.state)}
        data_faults = {path: _data_fault(path, sizes) for path in {e.data for e in layout.episodes if e.data}}
        for listed in layout.episodes:
            ref = self._reference(listed, splits)
            if fault := _episode_fault(listed, data_faults):
                bad.append(f"{ref.id}: {fault}")
            else:
                episodes.append(ref)
        return Scan(
            episodes=episodes,
            files=layout.files,
            cameras=list(chosen),
            rate_hz=float(info["fps"]),
            action=spec,
            proprio_dim=_size(features, self.state),
            options={
                "layout": layout.version,
                "cameras": chosen,
                "action_kind": self.action_kind,
                "action": self.action,
                "state": self.state,
                "robot_type": info.get("robot_type"),
            },
            bad=bad,
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        info = read_info(self.src)
        features, fps = info["features"], float(info["fps"])
        path, index = self.src / episode.file, int(episode.key)
        names = [n for n in (self.action, self.state) if n in features]
        rows = _numbers(path, ("episode_index", "frame_index", "timestamp", *names))
        rows = rows.filter(pc.equal(rows["episode_index"], index)).sort_by("frame_index")
        if len(rows) != episode.length:
            raise DataError(f"{path.name}: {len(rows)} rows; the episode table says {episode.length}")
        times = _times(rows, fps)
        vectors = {n: _matrix(rows[n], n, _size(features, n)) for n in names}
        nothing = np.zeros((len(rows), 0), np.float32)
        return EpisodeData(
            frames={
                camera: self._frames(episode, feature, times, 1 / fps)
                for camera, feature in self._chosen(features, []).items()
            },
            times=times,
            actions=vectors.get(self.action, nothing),
            proprio=vectors.get(self.state, nothing),
        )

    def _frames(self, episode: EpisodeRef, feature: str, times: np.ndarray, period: float) -> Frames:
        if feature not in episode.private["videos"]:
            return self._images(self.src / episode.file, int(episode.key), feature)
        from data_tools.formats.decode import video_frames

        file, begins = episode.private["videos"][feature]
        wanted = begins + times
        window = max(0.0, float(wanted[0]) - period / 2), float(wanted[-1]) + period
        shown, frames = video_frames(self.src / file, *window)
        numbers = _nearest(shown, wanted)
        lost = np.flatnonzero(np.abs(shown[numbers] - wanted) > period / 2)
        if len(lost):
            raise DataError(
                f"{feature}: {Path(file).name} lacks {len(lost)} of {len(wanted)} frames, the first at "
                f"{wanted[lost[0]]:.3f} s"
            )
        return lambda indices: frames(numbers[np.asarray(indices, np.int64)].tolist())

    def _images(self, path: Path, index: int, feature: str) -> Frames:
        """Encoded images from a parquet column of structs {bytes, path}."""

        def frames(indices: Sequence[int]) -> Iterator[bytes]:
            rows = read_columns(path, ["episode_index", "frame_index", feature], index).sort_by("frame_index")
            for i in indices:
                image = rows[feature][i].as_py() or {}
                if not image.get("bytes"):
                    raise DataError(f"{feature}: frame {i} has no image in {path.name}")
                yield image["bytes"]

        return frames

    def _chosen(self, features: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
        """Camera → feature, in the order asked for."""
        images = [f for f, about in features.items() if about.get("dtype") in ("video", "image") and not _depth(about)]
        short = {
            f: next((f.removeprefix(p) for p in _PREFIXES if f.startswith(p)), f).replace("/", "_") for f in images
        }
        if not images:
            problems.append(f"{self.src}: no camera among the features {', '.join(features)}")
        if self.cameras is None:
            return {short[f]: f for f in images}
        by_name = {name: f for f in images for name in (f, short[f])}
        if unknown := [c for c in self.cameras if c not in by_name]:
            problems.append(f"cameras: no {', '.join(unknown)}; there is: {', '.join(short.values())}")
        return {short[by_name[c]]: by_name[c] for c in self.cameras if c in by_name}

    def _action_spec(self, features: Mapping[str, Any], problems: list[str]) -> ActionSpec | None:
        dim = _size(features, self.action)
        if self.action_kind not in ("other", *ACTIONS):
            problems.append(f"action_kind: {self.action_kind!r} must be one of other, {', '.join(ACTIONS)}")
        if self.gripper is not None and not (self.action_kind == "other" and 0 <= self.gripper < dim):
            problems.append(f"gripper: {self.gripper} must be below {dim}, and only with action_kind other")
        if not dim:
            return None
        if spec := ACTIONS.get(self.action_kind):
            if spec.dim != dim:
                problems.append(f"action_kind: {self.action_kind} has {spec.dim} numbers, but {self.action} has {dim}")
            return spec
        names = ", ".join(_names(features[self.action].get("names"))) or f"{dim} numbers"
        return ActionSpec(
            dim=dim,
            text=f"{self.action} as stored: {names}",
            mode="other",
            gripper=self.gripper,
            gripper_open=self.gripper_open,
            gripper_closed=self.gripper_closed,
        )

    def _reference(self, listed: Listed, splits: Callable[[int], str]) -> EpisodeRef:
        instruction = "; ".join(listed.tasks)
        return EpisodeRef(
            id=f"episode_{listed.index:06d}",
            file=listed.data.relative_to(self.src).as_posix() if listed.data else "",
            key=str(listed.index),
            length=listed.length,
            task=instruction,
            instruction=instruction,
            split=splits(listed.index),
            meta=listed.meta,
            private={"videos": {k: (str(p.relative_to(self.src)), t) for k, (p, t) in listed.videos.items() if p}},
        )


def _splits(info: Mapping[str, Any]) -> Callable[[int], str]:
    """Episode → split, from info.json's "splits": {"train": "0:45", …}."""
    ranges = {}
    for name, text in (info.get("splits") or {}).items():
        first, _, last = str(text).partition(":")
        if first.isdigit() and last.isdigit():
            ranges[name] = range(int(first), int(last))
    return lambda index: next((name for name, members in ranges.items() if index in members), "")


def _size(features: Mapping[str, Any], name: str) -> int:
    return math.prod(features[name]["shape"]) if name in features else 0


def _depth(about: Mapping[str, Any]) -> bool:
    info = {**about, **(about.get("info") or {}), **(about.get("video_info") or {})}
    return bool(info.get("video.is_depth_map") or info.get("is_depth_map"))


def _names(names: Any) -> list[str]:
    """A feature's names are a list, or lists in a dict such as {"motors": […]}, or missing."""
    if isinstance(names, Mapping):
        return [name for part in names.values() for name in _names(part)]
    return [str(name) for name in names] if isinstance(names, list) else []


def _data_fault(path: Path, sizes: Mapping[str, int]) -> str:
    """What is wrong with a data file, by its footer alone; nothing: ""."""
    try:
        schema = parquet_file(path).schema_arrow
    except DataError as e:
        return str(e)
    for name, size in sizes.items():
        if size and name not in schema.names:
            return f"{path.name}: has no column {name}"
        if size and pa.types.is_fixed_size_list(kind := schema.field(name).type) and kind.list_size != size:
            return f"{path.name}: {name} has {kind.list_size} numbers; info.json says {size}"
    return ""


def _episode_fault(listed: Listed, data_faults: Mapping[Path, str]) -> str:
    if listed.data is None:
        return "its data file is missing"
    if data_faults[listed.data]:
        return data_faults[listed.data]
    if missing := [feature for feature, (path, _) in listed.videos.items() if path is None]:
        return f"its video file of {', '.join(missing)} is missing"
    return "" if listed.length > 1 else f"{listed.length} frames"


def _numbers(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """Columns of a data file; the last file's are kept, because v3.0 has many episodes in each."""
    try:
        return _kept_numbers(path, path.stat().st_mtime_ns, columns)
    except OSError as e:
        raise DataError(f"{path.name}: cannot be read ({e.strerror})") from e


@lru_cache(maxsize=1)
def _kept_numbers(path: Path, modified: int, columns: tuple[str, ...]) -> pa.Table:
    return read_columns(path, list(columns))


def _times(rows: pa.Table, fps: float) -> np.ndarray:
    stored = rows["timestamp"].to_numpy().astype(np.float64).ravel()
    numbered = rows["frame_index"].to_numpy() / fps
    times = numbered if np.abs(stored - numbered).max() < _TIME_TOLERANCE else stored
    if (np.diff(times) <= 0).any():
        raise DataError(f"timestamps do not increase at frame {int(np.argmax(np.diff(times) <= 0)) + 1}")
    return times


def _matrix(column: pa.ChunkedArray, name: str, size: int) -> np.ndarray:
    """A column of numbers, or of lists of `size` numbers, as (T, size)."""
    values = column.combine_chunks()
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        nested = pa.types.is_nested(values.type.value_type)
        if not nested and (lengths != size).any():
            t = int(np.argmax(lengths != size))
            raise DataError(f"{name} has {lengths[t]} numbers at frame {t}; info.json says {size}")
    while pa.types.is_nested(values.type):
        values = values.flatten()
    flat = values.to_numpy(zero_copy_only=False)
    if flat.size != len(column) * size:
        raise DataError(f"{name} has {flat.size} numbers in {len(column)} frames; info.json says {size} each")
    return flat.reshape(len(column), size)


def _nearest(shown: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of the time in `shown` (increasing) that is nearest to each in `wanted`."""
    right = np.clip(np.searchsorted(shown, wanted), 1, max(1, len(shown) - 1))
    right = np.minimum(right, len(shown) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(wanted - shown[left] <= shown[right] - wanted, left, right)
