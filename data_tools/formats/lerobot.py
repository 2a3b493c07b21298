"""LeRobotDataset v2.x and v3.0 and their variants: numbers in parquet, frames in mp4 (or images in parquet).

Frame t is paired with the state at t and the action taken at t. The files do not state what the
numbers of an action mean, so the user does (`action_kind` or `mode`); otherwise actions are kept unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.formats import remarks
from data_tools.formats.declared import Orientation, absolute_gripper, upright
from data_tools.formats.lerobot_actions import LerobotActionOptions, action_spec, orientation
from data_tools.formats.lerobot_files import (
    Listed,
    VideoWindow,
    find_layout,
    median_step,
    parquet_file,
    read_columns,
    read_tasks,
)
from data_tools.formats.lerobot_meta import Info, LeRobotFeature, read_info
from data_tools.formats.lerobot_rows import Rows, has_column, read_rows, row_notes, unsaid
from data_tools.formats.lerobot_tasks import TASK_INDEX, instruction_column, row_texts, table_texts
from data_tools.formats.lerobot_vectors import FeatureSlice, choose, matrix
from data_tools.formats.lerobot_windows import check_windows, paired_frames
from data_tools.formats.rotations import ROTATION_SIZE, Rotation, pose_vectors
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Film, Frames, Scan
from stamo_dist.errors import DataError

#: Prefixes that are removed from a feature's name to obtain the camera's name.
_PREFIXES = ("observation.images.", "observation.")
#: Relative deviation of timestamps from the stated rate that is accepted: clock drift, or 29.97 Hz stated as 30.
SAME_RATE = 0.02
#: If timestamps and stated rate differ by more than this factor, one of the two is wrong.
OTHER_RATE = 1.5
#: A stored time (float32) this close to frame number / fps (s) is replaced by exactly that quotient.
_TIME_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Choice:
    """The features and conventions that the options and info.json select."""

    info: Info
    cameras: dict[str, str]
    action: list[FeatureSlice]
    state: list[FeatureSlice]
    pose: list[FeatureSlice]
    spec: ActionSpec | None
    turned: Orientation
    instruction: str | None
    notes: list[str]

    @property
    def columns(self) -> list[str]:
        parts = [*self.action, *self.state, *self.pose]
        return list(dict.fromkeys(p.feature.name for p in parts))


@dataclass
class LerobotReader(LerobotActionOptions):
    """Reads a LeRobotDataset's folder, the one with `meta`, `data` and `videos`; also GR00T's and AgiBot's.

    Rows and frames are paired by order; if their counts differ, each row needs a frame at its own time.

    Args:
        src: The dataset's folder.
        cameras: Cameras to convert, by feature (observation.images.front) or in short (front); all when omitted. Depth
            maps are left out.
        action_kind: See `LerobotActionOptions`.
        action: Features whose numbers, side by side, are the action, or slices of GR00T's meta/modality.json; "none"
            for none. Omitted: action or actions.
        state: Likewise the proprioception. Omitted: observation.state, state or observation.states.
        instruction: Feature with each row's instruction, a text or the number of one in meta/tasks; "none" for the
            episode table's alone. Omitted: GR00T's annotation.human.…description, else task_index. Row
            instructions override the table's.
        image_orientation, gripper, gripper_open, gripper_closed, mode, rotation, metres, radians: See
            `LerobotActionOptions`.
        pose: Feature whose first numbers are the end effector's position and rotation, for absolute actions.
        pose_rotation: Its rotation; as `rotation` when omitted.
    """

    src: Path
    cameras: Sequence[str] | None = None
    action: Sequence[str] = ()
    state: Sequence[str] = ()
    instruction: str = ""  # default () instead of None, so that "none" is a value
    pose: str | None = None

    def scan(self) -> Scan:
        chosen = self._settle()
        info, features, notes = chosen.info, chosen.info.features, list(chosen.notes)
        layout = find_layout(self.src, [f for f in chosen.cameras.values() if features[f].dtype == "video"])
        windows = check_windows(self.src, layout.episodes, info.fps)
        notes += layout.notes
        faults = _data_faults(layout.episodes, chosen, notes)
        by_rows = read_rows(layout.episodes, chosen.instruction, layout.tasks, info.fps)
        unnamed = ""
        if chosen.instruction == TASK_INDEX and TASK_INDEX in features and not layout.tasks:
            unnamed = "meta/tasks names no task, so that the rows' task_index says nothing"
            if any(table_texts(e.tasks, layout.tasks) for e in layout.episodes):
                notes.append(f"instructions: {unnamed}; the episode table's are taken")
        episodes: list[EpisodeRef] = []
        taken: list[Listed] = []
        bad: list[str] = []
        for listed in layout.episodes:
            rows = by_rows.get(listed.index, Rows())
            fault = listed.fault or (faults[listed.data] if listed.data else "") or windows.faults.get(listed.index, "")
            texts = rows.texts or table_texts(listed.tasks, layout.tasks)
            fault = fault or _text_fault(listed, rows, texts, chosen.instruction, unnamed)
            ref = self._reference(listed, next(iter(texts), ""), info)
            if fault:
                bad.append(f"{ref.id}: {fault}")
                continue
            if listed.index in windows.short:
                notes.append(
                    f"{ref.id}: its last row is left out: {windows.short[listed.index]} has a frame too few; if it is "
                    "not the last that is missing, the rows after it show the next one's"
                )
                ref = replace(ref, length=ref.length - 1)
            episodes.append(ref)
            taken.append(listed)
        notes += remarks.hdr_videos(windows.hdr)
        notes += row_notes(taken, by_rows, layout.tasks, info.fps)
        notes += self._rate_notes(layout.episodes, bad, info.fps)
        if silent := sum(not e.instruction for e in episodes):
            notes.append(
                f"{silent} of {len(episodes)} episodes have no instruction; give them with --instructions FILE.csv"
            )
        return Scan(
            episodes=episodes,
            files=layout.files,
            cameras=list(chosen.cameras),
            rate_hz=info.fps,
            action=chosen.spec,
            proprio_dim=sum(p.end - p.start for p in chosen.state),
            options={
                "layout": layout.version,
                "cameras": chosen.cameras,
                "action_kind": self.action_kind or "other",
                "action": [p.feature.name for p in chosen.action],
                "state": [p.feature.name for p in chosen.state],
                "instruction": chosen.instruction,
                "image_orientation": chosen.turned,
                "robot_type": info.robot_type,
            },
            bad=bad,
            notes=notes,
            frame_size=features[next(iter(chosen.cameras.values()))].frame_size if chosen.cameras else None,
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        chosen = self._settle()
        fps = chosen.info.fps
        path, index = self.src / episode.file, int(episode.key)
        there = set(parquet_file(path).schema_arrow.names)
        extra = [n for n in ("frame_index", "timestamp", chosen.instruction) if n is not None and n in there]
        rows = _numbers(path, ("episode_index", *dict.fromkeys([*extra, *chosen.columns])))
        rows = _in_order(rows.filter(pc.equal(rows["episode_index"], index)))
        listed: int = episode.private["rows"]
        if len(rows) != listed:
            raise DataError(f"{path.name}: {len(rows)} rows; the episode table says {listed}")
        times = _times(rows, fps)
        frames: dict[str, Frames] = {}
        films: dict[str, Film] = {}
        count = len(rows)
        for camera, feature in chosen.cameras.items():
            if feature in episode.private["videos"]:
                file, begins, ends = episode.private["videos"][feature]
                pictures, shown = paired_frames(feature, VideoWindow(self.src / file, begins, ends), times, fps)
                films[camera] = Film(self.src / file, shown, chosen.turned)
                count = min(count, len(shown))
            else:
                pictures = self._images(path, index, feature)
            frames[camera] = upright(pictures, chosen.turned)
        rows, times = rows.slice(0, count), times[:count]
        actions = matrix(rows, chosen.action)
        if self.gripper == "relative":
            actions = np.column_stack([actions[:, :-1], absolute_gripper(actions[:, -1])])
        return EpisodeData(
            frames=frames,
            times=times,
            actions=actions,
            proprio=matrix(rows, chosen.state),
            pose=pose_vectors(matrix(rows, chosen.pose), self._pose_rotation) if chosen.pose else None,
            instructions=self._instructions(rows, chosen, episode),
            films=films,
        )

    @property
    def _pose_rotation(self) -> Rotation:
        return self.pose_rotation or self.rotation or "euler_xyz"

    def _instructions(self, rows: pa.Table, chosen: _Choice, episode: EpisodeRef) -> list[str] | None:
        """Instruction of each row, if one differs from the episode's."""
        if chosen.instruction not in rows.column_names or chosen.instruction is None:
            return None
        tasks = read_tasks(self.src)
        if chosen.instruction == TASK_INDEX and not tasks:
            return None
        texts = row_texts(rows[chosen.instruction], chosen.instruction, tasks, episode.instruction)
        return texts if set(texts) != {episode.instruction} else None

    def _settle(self) -> _Choice:
        """Settle every feature and convention.

        Raises:
            DataError: Unknown or contradictory options, all at once.
        """
        info = read_info(self.src)
        problems: list[str] = []
        notes: list[str] = []
        cameras = self._cameras(info.features, notes, problems)
        parts: dict[str, list[FeatureSlice]] = {"action": [], "state": [], "pose": []}
        for option in ("action", "state"):
            try:
                parts[option] = choose(self.src, option, getattr(self, option), info.features, notes)
            except DataError as e:
                problems.append(str(e))
        if self.pose is not None:
            try:
                parts["pose"] = choose(self.src, "pose", [self.pose], info.features, notes)
                if sum(p.end - p.start for p in parts["pose"]) < 3 + ROTATION_SIZE[self._pose_rotation]:
                    problems.append(f"pose: {self.pose} has no room for a position and a rotation")
            except (DataError, KeyError) as e:
                problems.append(str(e))
        instruction = None
        try:
            instruction = instruction_column(self.instruction, info.features)
        except DataError as e:
            problems.append(str(e))
        spec = action_spec(self, parts["action"], problems)
        turned = orientation(self, list(cameras), notes, problems)
        if problems:
            raise DataError("\n".join(problems))
        return _Choice(info, cameras, **parts, spec=spec, turned=turned, instruction=instruction, notes=notes)

    def _images(self, path: Path, index: int, feature: str) -> Frames:
        """Encoded images from a parquet column of structs {bytes, path}, or of the bytes themselves."""

        def frames(indices: Sequence[int]) -> Iterator[bytes]:
            order = [n for n in ("frame_index", "timestamp") if n in parquet_file(path).schema_arrow.names]
            rows = _in_order(read_columns(path, ["episode_index", *order, feature], index))
            for i in indices:
                image = rows[feature][i].as_py()
                image = image.get("bytes") if isinstance(image, dict) else image
                if not isinstance(image, bytes) or not image:
                    raise DataError(f"{feature}: frame {i} has no image in {path.name}")
                yield image

        return frames

    def _cameras(self, features: Mapping[str, LeRobotFeature], notes: list[str], problems: list[str]) -> dict[str, str]:
        """Camera → feature, in the order asked for."""
        pictures = {f: about for f, about in features.items() if about.dtype in ("video", "image")}
        images = [f for f, about in pictures.items() if not about.depth]
        if depth := [f for f, about in pictures.items() if about.depth]:
            notes.append(f"depth maps are left out: {', '.join(depth)}")
        short = {
            f: next((f.removeprefix(p) for p in _PREFIXES if f.startswith(p)), f).replace("/", "_") for f in images
        }
        if not images:
            problems.append(
                f"{self.src / 'meta' / 'info.json'}: no camera (of dtype video or image, no depth map) among the "
                f"features {', '.join(features)}{''.join(f'; {note}' for note in notes)}"
            )
        if doubles := [name for name, n in Counter(short.values()).items() if n > 1]:
            short = {f: f.replace("/", "_") if name in doubles else name for f, name in short.items()}
        if self.cameras is None:
            return {short[f]: f for f in images}
        by_name = {name: f for f in images for name in (f, short[f])}
        if unknown := [c for c in self.cameras if c not in by_name]:
            problems.append(f"cameras: no {', '.join(unknown)}; there is: {', '.join(short.values())}")
        return {short[by_name[c]]: by_name[c] for c in self.cameras if c in by_name}

    def _rate_notes(self, episodes: Sequence[Listed], bad: Sequence[str], fps: float) -> list[str]:
        """A note if the first episode's timestamps do not match info.json's fps.

        Raises:
            DataError: They differ by so much that one of them is wrong.
        """
        known = (e for e in episodes if e.data is not None and not any(b.startswith(f"{e.name}: ") for b in bad))
        if (first := next(known, None)) is None or first.data is None:
            return []
        try:
            step = median_step(first.data, first.index)
        except DataError:  # reported when the episode is read
            return []
        if step is None or abs(step * fps - 1) < SAME_RATE:
            return []
        where = f"{self.src / 'meta' / 'info.json'}, fps"
        said = (
            f"{where}: {fps:g}, but the timestamps of {first.data.name} are {step:.3g} s apart, {1 / step:.4g} a second"
        )
        if not 1 / OTHER_RATE < step * fps < OTHER_RATE:
            raise DataError(f"{said}; mend the one that is wrong")
        return [said]

    def _reference(self, listed: Listed, instruction: str, info: Info) -> EpisodeRef:
        return EpisodeRef(
            id=listed.name,
            file=listed.data.relative_to(self.src).as_posix() if listed.data else "",
            key=str(listed.index),
            length=listed.length,
            task=instruction,
            instruction=instruction,
            split=next((name for name, members in info.splits.items() if listed.index in members), ""),
            meta=listed.meta,
            private={
                "rows": listed.length,
                "videos": {
                    key: (window.path.relative_to(self.src).as_posix(), window.begins, window.ends)
                    for key, window in listed.videos.items()
                },
            },
        )


def _data_faults(episodes: Sequence[Listed], chosen: _Choice, notes: list[str]) -> dict[Path, str]:
    """What is wrong with each data file, by its footer alone; "" if nothing is."""
    features, column = chosen.info.features, chosen.instruction
    needed = [*chosen.columns, *(f for f in chosen.cameras.values() if features[f].dtype == "image")]
    parts = {p.feature.name: p.feature for p in (*chosen.action, *chosen.state, *chosen.pose)}
    files = sorted({e.data for e in episodes if e.data})
    if column and column in features and column != TASK_INDEX:
        if any(has_column(path, column) for path in files):
            needed.append(column)  # if some files have the column, the table does not replace it in the others
        else:
            notes.append(f"instructions: no file has a column {column}; the episode table's are taken")
    return {path: _data_fault(path, needed, parts) for path in files}


def _text_fault(listed: Listed, rows: Rows, texts: Sequence[str], column: str | None, unnamed: str) -> str:
    """Why an episode's instructions or length cannot be used; "" if they can. `unnamed`: why task_index cannot be."""
    if unnamed and len(texts) > 1:
        return f"{unnamed}, and the episode table has several instructions: {', '.join(texts)!r:.80}"
    if fault := rows.fault or ("" if listed.length > 1 else f"{listed.length} frames"):
        return fault
    if len(texts) > 1 and not rows.texts and listed.data and column:
        return unsaid(listed.data, column, texts)
    return ""


def _data_fault(path: Path, needed: Sequence[str], parts: Mapping[str, LeRobotFeature]) -> str:
    """What is wrong with a data file, judged by its footer; "" if nothing is."""
    try:
        schema = parquet_file(path).schema_arrow
    except DataError as e:
        return str(e)
    if missing := [name for name in ("episode_index", *needed) if name not in schema.names]:
        return f"{path.name}: has no column {', '.join(missing)}"
    for name, feature in parts.items():
        kind: Any = schema.field(name).type
        if pa.types.is_fixed_size_list(kind) and kind.list_size != feature.size:
            return f"{path.name}: {name} has {kind.list_size} numbers; info.json says {feature.size}"
    return ""


def _numbers(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """Columns of a data file; those of the last file are cached, because v3.0 stores many episodes per file."""
    try:
        return _kept_numbers(path, path.stat().st_mtime_ns, columns)
    except OSError as e:
        raise DataError(f"{path.name}: cannot be read ({e.strerror})") from e


@lru_cache(maxsize=1)
def _kept_numbers(path: Path, modified: int, columns: tuple[str, ...]) -> pa.Table:
    return read_columns(path, list(columns))


def _in_order(rows: pa.Table) -> pa.Table:
    """Sort rows by frame_index, else by timestamp; without either they are taken to be in order."""
    by = next((name for name in ("frame_index", "timestamp") if name in rows.column_names), None)
    return rows.sort_by(by) if by else rows


def _times(rows: pa.Table, fps: float) -> np.ndarray:
    numbered = np.arange(len(rows)) / fps
    if "frame_index" in rows.column_names:
        numbered = rows["frame_index"].to_numpy() / fps
    if "timestamp" not in rows.column_names:
        return numbered
    stored = rows["timestamp"].to_numpy().astype(np.float64).ravel()
    times = numbered if np.abs(stored - numbered).max() < _TIME_TOLERANCE else stored
    if not (np.diff(times) > 0).all():
        raise DataError(f"timestamps do not increase at frame {int(np.argmin(np.diff(times) > 0)) + 1}")
    return times
