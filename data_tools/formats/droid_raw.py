"""DROID's raw episodes (https://droid-dataset.github.io/droid/the-droid-dataset): LAB/{success,failure}/DATE/EPISODE/.

  trajectory.h5                  T steps
    action/cartesian_position (T, 6; m, Euler angles x y z in rad), cartesian_velocity, joint_position, joint_velocity,
      gripper_position (T,; 0 open, 1 closed)
    observation/robot_state/cartesian_position, gripper_position, joint_positions
    observation/timestamp/cameras/SERIAL_estimated_capture (T,; ms), skip_action, control/step_start
  metadata_UUID.json             uuid, current_task, success, trajectory_length, {wrist,ext1,ext2}_cam_serial, …
  recordings/MP4/SERIAL.mp4      the left picture, or SERIAL-stereo.mp4: left and right side by side; frame t is step t

The names are those of droid/postprocessing/schema.py and droid/trajectory_utils/misc.py. An mp4's own times are not
used: its nominal rate is the camera's (60 Hz), its frames are the steps (15 Hz).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from data_tools.formats import hdf5, remarks
from data_tools.formats.checked import an_object, flag, read_object, shown, text_at, whole
from data_tools.formats.declared import ImageOptions, not_one_of, orientation_problems, upright
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Frames, Scan, check_there, walk
from stamo_dist.errors import DataError

CAMERAS = ("ext1", "ext2", "wrist")
TRAJECTORY = "trajectory.h5"
ANNOTATIONS = "aggregated-annotations*.json"
RATE_HZ = 15.0
STATE = ("cartesian_position", "gripper_position", "joint_positions")
PROPRIO_DIM = 14
#: Frames that may be missing at the end of a recording; DROID's own loader ends the episode there.
LACKING = 2
#: A frame with a larger ratio of width to height holds two images side by side (stereo).
STEREO = 2.5
OPEN, CLOSED = 0.0, 1.0
_POSE = ActionSpec(
    dim=7,
    text="DROID cartesian_position: pose to reach (m, Euler x y z in rad), gripper 0 open 1 closed",
    mode="absolute",
    translation=(0, 1, 2),
    rotation=(3, 4, 5),
    rotation_kind="euler_xyz",
    gripper=6,
    gripper_open=OPEN,
    gripper_closed=CLOSED,
)
#: Convention of droid/robot_ik/robot_ik_solver.py.
_VELOCITY = "DROID cartesian_velocity: 1 = 7.5 cm or 0.15 rad (Euler x y z) a step, gripper 0 open 1 closed"
_JOINTS = ActionSpec(
    dim=8,
    text="DROID joint_position (rad), gripper 0 open 1 closed",
    mode="other",
    gripper=7,
    gripper_open=OPEN,
    gripper_closed=CLOSED,
)
ACTIONS = {
    "cartesian_position": _POSE,
    "cartesian_velocity": replace(_POSE, text=_VELOCITY, mode="delta", metres=0.075, radians=0.15),
    "joint_position": _JOINTS,
    "joint_velocity": replace(_JOINTS, text="DROID joint_velocity, gripper 0 open 1 closed"),
}


@dataclass
class DroidRawReader(ImageOptions):
    """Reads a folder of raw DROID episodes, at their own times.

    proprio is the end effector's pose (6), the gripper (1) and the joints (7).

    Args:
        src: A folder, searched for trajectory.h5.
        cameras: Of ext1, ext2, wrist; all when omitted.
        action: "cartesian_position" (poses to reach), "cartesian_velocity", "joint_position" or "joint_velocity", each
            with the gripper's position.
        annotations: DROID's aggregated-annotations-….json (instructions by uuid); the one in SRC when omitted. Episodes
            missing in it take their metadata's current_task.
        image_orientation: See `ImageOptions`.
        only_successful: Leave failed episodes out.
        success_only: The older name of only_successful.
        skipped: "drop" or "keep" the steps at which the operator paused, whose actions were not executed.
    """

    src: Path
    cameras: Sequence[str] | None = None
    action: Literal["cartesian_position", "cartesian_velocity", "joint_position", "joint_velocity"] = (
        "cartesian_position"
    )
    annotations: Path | None = None
    only_successful: bool = False
    success_only: bool = False
    skipped: Literal["drop", "keep"] = "drop"

    def scan(self) -> Scan:
        src = Path(self.src)
        if problems := self._check_options():
            raise DataError("\n".join(problems))
        if not (found := [p for p in walk(src) if p.name == TRAJECTORY]):
            raise DataError(f"{src}: no {TRAJECTORY} in this folder: not DROID's raw layout")
        said = self._annotations()
        episodes: list[EpisodeRef] = []
        bad: list[str] = []
        files: list[Path] = []
        for path in found:
            id = path.parent.relative_to(src).as_posix()
            try:
                check_there(path)
                meta, episode_files = self._metadata(path)
                videos = self._videos(path.parent, meta)
                length = _stated_length(meta) or _length(path)
            except DataError as e:
                bad.append(f"{id}: {e}")
                continue
            files += [path, *episode_files, *videos.values()]
            episodes.append(
                EpisodeRef(
                    id=id,
                    file=path.relative_to(src).as_posix(),
                    key="",
                    length=length,
                    task=meta.get("current_task") or "",
                    instruction=said.get(meta.get("uuid") or "", "") or meta.get("current_task") or "",
                    meta={k: v for k, v in meta.items() if not k.endswith(("_path", "_extrinsics"))},
                    private={c: {"video": p.name, "serial": meta[f"{c}_cam_serial"]} for c, p in videos.items()},
                )
            )
        only = self.only_successful or self.success_only
        episodes, notes = remarks.succeeded(episodes, only)
        notes += remarks.unsaid_instructions(episodes)
        if not episodes:
            head = f"{src}: none of {len(found)} episodes can be used" + (" or succeeded" if only else "")
            raise DataError("\n".join([head, *bad[:5]]))
        return Scan(
            episodes=episodes,
            files=files,
            cameras=list(self._cameras()),
            rate_hz=RATE_HZ,
            action=ACTIONS[self.action],
            proprio_dim=PROPRIO_DIM,
            options={
                "action": self.action,
                "only_successful": only,
                "skipped": self.skipped,
                "image_orientation": self.image_orientation,
            },
            bad=bad,
            notes=notes,
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        path = Path(self.src) / episode.file
        videos = {c: self._video(path.parent, episode.private[c]["video"]) for c in self._cameras()}
        with hdf5.open_file(path) as file:
            values = _read(file, self.action)
            length = len(values["actions"])
            for camera, (frames, _) in videos.items():
                if frames < length - LACKING:
                    raise DataError(f"{camera}: {frames} frames for {length} steps")
            length = min([length, *(frames for frames, _ in videos.values())])
            steps = np.arange(length)
            if self.skipped == "drop":
                steps = np.flatnonzero(~_skipped(file, len(values["actions"]))[:length])
            serial = episode.private[self._cameras()[0]]["serial"]
            times = _times(file, serial, len(values["actions"]))[steps]
        if not len(steps):
            raise DataError("no step was executed")
        return EpisodeData(
            frames={
                camera: upright(_at(frames, steps), self.image_orientation) for camera, (_, frames) in videos.items()
            },
            times=times,
            **{name: rows[steps] for name, rows in values.items()},
        )

    def _cameras(self) -> Sequence[str]:
        return self.cameras or CAMERAS

    def _check_options(self) -> list[str]:
        problems = [f"cameras: no {c!r}; there are {', '.join(CAMERAS)}" for c in self._cameras() if c not in CAMERAS]
        problems += orientation_problems(self.image_orientation)
        problems += not_one_of(ACTIONS, action=self.action)
        if self.skipped not in ("drop", "keep"):
            problems.append(f"skipped: {self.skipped!r} must be drop or keep")
        if self.annotations is not None and not Path(self.annotations).is_file():
            problems.append(f"annotations: {self.annotations}: no such file")
        return problems

    def _annotations(self) -> dict[str, str]:
        """uuid → the first of its instructions that is not empty."""
        src = Path(self.src)
        found = (
            [Path(self.annotations)]
            if self.annotations
            else sorted({*src.glob(ANNOTATIONS), *src.parent.glob(ANNOTATIONS)})
        )
        said: dict[str, str] = {}
        for path in found:
            for uuid, entry in read_object(path).items():
                where = f"{path}, {uuid}"
                texts = [text_at(an_object(entry, where), f"language_instruction{k}", where) for k in (1, 2, 3)]
                said[uuid] = next((text for text in texts if text), "")
        return said

    def _metadata(self, path: Path) -> tuple[dict[str, Any], list[Path]]:
        """The episode's metadata_*.json, or the attributes of trajectory.h5 if there is none."""
        found = sorted(path.parent.glob("metadata_*.json"))
        if found:
            return _checked(read_object(found[0]), found[0]), found[:1]
        with hdf5.open_file(path) as file:
            kinds = hdf5.node(file, "observation/camera_type")
            if not isinstance(kinds, h5py.Group):
                raise DataError(f"no metadata_*.json, and {TRAJECTORY} has no observation/camera_type")
            if fault := hdf5.missing_keys(kinds, list(kinds)) or next(
                iter(hdf5.number_faults(kinds, list(kinds))), None
            ):
                raise DataError(f"{TRAJECTORY}, observation/camera_type: {fault}")
            exterior = iter(("ext1", "ext2"))
            serials = [s for s in sorted(kinds) if len(kinds[s])]
            names = {("wrist" if np.ravel(kinds[s][0])[0] == 0 else next(exterior, "")): s for s in serials}
            meta = {f"{name}_cam_serial": serial for name, serial in names.items() if name}
            task, success = hdf5.attribute_text(file, "current_task"), hdf5.attribute(file, "success")
            if success is not None:
                success = flag(success, hdf5.place(file, "success"))
            elif {"success", "failure"} & set(path.parts):
                success = "success" in path.parts
            return meta | {"current_task": task or "", "success": success}, []

    def _videos(self, folder: Path, meta: Mapping[str, Any]) -> dict[str, Path]:
        """Camera → its recording."""
        videos, problems = {}, []
        recordings = folder / "recordings" / "MP4"
        for camera in self._cameras():
            serial = meta.get(f"{camera}_cam_serial")
            if serial is None:
                problems.append(f"no {camera}_cam_serial in its metadata")
                continue
            names = (f"{serial}.mp4", f"{serial}-stereo.mp4")
            path = next((p for name in names if (p := recordings / name).is_file()), None)
            if path is None:
                there = ", ".join(sorted(p.name for p in recordings.glob("*.mp4"))) or "nothing"
                problems.append(f"no recordings/MP4/{serial}.mp4 ({camera}); there is {there}")
            else:
                videos[camera] = path
        if problems:
            raise DataError("; ".join(problems))
        return videos

    def _video(self, folder: Path, name: str) -> tuple[int, Frames]:
        from data_tools.formats.decode import video_frames

        times, frames = video_frames(folder / "recordings" / "MP4" / name)
        return len(times), frames


def _read(file: h5py.File, action: str) -> dict[str, np.ndarray]:
    """actions, proprio and pose of all steps.

    Raises:
        DataError: Keys are missing or of different lengths.
    """
    from scipy.spatial.transform import Rotation

    keys = [f"action/{action}", "action/gripper_position", *(f"observation/robot_state/{k}" for k in STATE)]
    if fault := hdf5.missing_keys(file, keys):
        raise DataError(f"{TRAJECTORY} has {fault}")
    if faults := hdf5.number_faults(file, keys):
        raise DataError(f"{TRAJECTORY}: {'; '.join(faults)}")
    columns = [file[key][:] for key in keys]
    if len({len(c) for c in columns}) > 1:
        raise DataError("lengths differ: " + ", ".join(f"{k} {len(c)}" for k, c in zip(keys, columns, strict=True)))
    arm, gripper, *state = (c.reshape(len(c), -1) for c in columns)
    values = {
        "actions": np.concatenate([arm, gripper], axis=1),
        "proprio": np.concatenate(state, axis=1),
    }
    for name, dim in (("actions", ACTIONS[action].dim), ("proprio", PROPRIO_DIM)):
        if values[name].shape[1] != dim:
            raise DataError(f"{name} have {values[name].shape[1]} dimensions, expected {dim}")
    pose = state[0]
    turn = Rotation.from_euler("xyz", pose[:, 3:]).as_rotvec()
    return values | {"pose": np.concatenate([pose[:, :3], turn], axis=1)}


def _skipped(file: h5py.File, length: int) -> np.ndarray:
    """bool (T,): the operator had paused and the action was not executed."""
    for name, means in (("timestamp/skip_action", True), ("controller_info/movement_enabled", False)):
        if f"observation/{name}" not in file:
            continue
        found = hdf5.node(file, f"observation/{name}")
        if not hdf5.is_rows(found) or found.shape != (length,) or found.dtype.kind not in "biuf":
            raise DataError(f"{TRAJECTORY}: observation/{name} is no row of {length} true or false")
        return found[:].astype(bool) == means
    return np.zeros(length, bool)


def _times(file: h5py.File, serial: str, length: int) -> np.ndarray:
    """(T,) seconds: when the camera took each frame, else when each step began.

    Raises:
        DataError: There are no such times.
    """
    stamps = hdf5.node(file, "observation/timestamp")
    names = [f"cameras/{serial}_estimated_capture", "control/step_start", "robot_state/read_start"]
    for name in names:
        found: Any = hdf5.node(stamps, name) if isinstance(stamps, h5py.Group) else None
        if (
            hdf5.is_rows(found)
            and found.shape == (length,)
            and found.dtype.kind in "iuf"
            and (np.diff(found[:].astype(np.int64)) > 0).all()
        ):
            milliseconds = found[:].astype(np.float64)
            return (milliseconds - milliseconds[0]) / 1000
    raise DataError(f"no increasing times: none of observation/timestamp/{{{', '.join(names)}}} has {length}")


def _at(frames: Frames, steps: np.ndarray) -> Frames:
    """The frames of these steps; of stereo frames the left half."""

    def chosen(indices: Sequence[int]) -> Iterator[np.ndarray | bytes]:
        for image in frames([int(steps[i]) for i in indices]):
            if isinstance(image, np.ndarray) and image.shape[1] > STEREO * image.shape[0]:
                yield image[:, : image.shape[1] // 2]
            else:
                yield image

    return chosen


def _stated_length(meta: Mapping[str, Any]) -> int:
    """The metadata's trajectory_length; 0 if missing."""
    said = meta.get("trajectory_length")
    return 0 if said is None else whole(said, "metadata_*.json, trajectory_length")


def _length(path: Path) -> int:
    with hdf5.open_file(path) as file:
        if fault := hdf5.missing_keys(file, ["action/gripper_position"]):
            raise DataError(f"{TRAJECTORY} has {fault}")
        return len(file["action/gripper_position"])


def _checked(meta: dict[str, Any], path: Path) -> dict[str, Any]:
    """An episode's metadata, with its field types checked.

    Raises:
        DataError: A field has another type.
    """
    checked = dict(meta)
    for key in ("current_task", "uuid"):
        checked[key] = text_at(meta, key, path.name)
    for key in (f"{camera}_cam_serial" for camera in CAMERAS):
        serial = meta.get(key)
        if isinstance(serial, bool) or not isinstance(serial, str | int | None):
            raise DataError(f"{path.name}, {key}: must be a serial number, not {shown(serial)}")
        checked[key] = None if serial is None else str(serial)
    if (success := meta.get("success")) is not None:
        checked["success"] = flag(success, f"{path.name}, success")
    return checked
