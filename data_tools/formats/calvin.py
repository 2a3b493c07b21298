"""CALVIN's raw layout (https://github.com/mees/calvin, dataset/README.md): play data, one .npz a frame.

  training/, validation/
    episode_0000000.npz            rgb_static (200, 200, 3), rgb_gripper (84, 84, 3), depth_*, rgb_tactile,
                                   robot_obs (15,), scene_obs (24,), actions (7,), rel_actions (7,)
    ep_start_end_ids.npy (E, 2)    first and last frame of each recording
    lang_annotations/auto_lang_ann.npy

robot_obs: position in m, Euler angles, gripper's width, 7 joints, gripper's command. actions: the pose to reach,
likewise, gripper 1 open -1 closed. rel_actions: what is to be added to position and Euler angles, 1 = 2 cm or 0.05 rad,
clipped to 1 (to_relative_action of calvin_env/utils/utils.py).
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from data_tools.formats import remarks
from data_tools.formats.calvin_language import (
    FILE,
    FOLDER,
    Annotated,
    annotation_folders,
    overlaps,
    read_annotations,
    said,
)
from data_tools.formats.declared import ImageOptions, not_one_of, not_positive, orientation_problems, upright
from data_tools.formats.rotations import pose_vectors
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Frames, Scan, check_lfs, chosen, columns
from stamo_dist.errors import DataError

TABLE = "ep_start_end_ids.npy"
SPLITS = ("training", "validation")
RATE_HZ = 30.0
#: The key that begins with the end effector's position and Euler angles, and how many numbers these are.
POSE_KEY, POSE = "robot_obs", 6
#: Key → type and shape.
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
#: Exceptions that numpy raises for a damaged .npz, or one with pickled objects.
DAMAGE = (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
Action = Literal["rel_actions", "actions", "none"]
Episodes = Literal["recorded", "annotated"]
_GRIPPER = {"gripper": 6, "gripper_open": 1.0, "gripper_closed": -1.0}
SPECS: dict[str, ActionSpec | None] = {
    "rel_actions": ActionSpec(
        dim=7,
        text="CALVIN rel_actions: added to position (1 = 0.02 m) and Euler angles xyz (1 = 0.05 rad), "
        "gripper 1 open -1 closed",
        mode="delta",
        translation=(0, 1, 2),
        metres=0.02,
        rotation=(3, 4, 5),
        rotation_kind="euler_xyz",
        radians=0.05,
        euler_added=True,
        **_GRIPPER,  # type: ignore[arg-type]
    ),
    "actions": ActionSpec(
        dim=7,
        text="CALVIN actions: pose to reach, x y z (1 = 1 m), Euler angles xyz (1 = 1 rad), gripper 1 open -1 closed",
        mode="absolute",
        translation=(0, 1, 2),
        rotation=(3, 4, 5),
        rotation_kind="euler_xyz",
        **_GRIPPER,  # type: ignore[arg-type]
    ),
    "none": None,
}


@dataclass
class CalvinReader(ImageOptions):
    """Reads CALVIN as it is downloaded: task_D_D, task_ABC_D, the debug set.

    Annotations are a pickle, of which only containers, texts and numbers are read: no code in it is executed.

    Args:
        src: The folder that holds `training` and `validation`, or one of them.
        cameras: Keys of the pictures; those that are RGB when omitted: rgb_static, rgb_gripper.
        action: "rel_actions", which CALVIN's policies give; "actions", the poses to reach, which are not clipped; or
            "none".
        proprio: Keys whose numbers, side by side, are the proprioception; `robot_obs` when omitted; "none" for none.
        episodes: "recorded": what was recorded in one go; frames have the text of the annotation they lie in, or none.
            "annotated": each annotated window is an episode, frames outside are left out.
        longest: Frames; longer recordings are cut into equal parts; "none" leaves them whole.
        annotations: Folder of the annotations in each split; lang_annotations when omitted.
        rate_hz: Frames per second; CALVIN's 30.
        image_orientation: See `ImageOptions`.
    """

    src: Path
    cameras: Sequence[str] | None = None
    action: Action = "rel_actions"
    proprio: Sequence[str] = ()  # default () instead of None, so that "none" is a value
    episodes: Episodes = "recorded"
    longest: int | None = 3000
    annotations: str | None = None
    rate_hz: float = RATE_HZ

    def scan(self) -> Scan:
        if problems := self._check_options():
            raise DataError("\n".join(problems))
        src = Path(self.src)
        episodes: list[EpisodeRef] = []
        bad: list[str] = []
        files: list[Path] = []
        notes: list[str] = []
        for split in find_splits(src):
            windows, tables = self._windows(split, notes)
            files += tables
            there = _frame_numbers(split)
            for ref in self._references(src, split, windows, notes):
                if fault := _missing(split, ref, there):
                    bad.append(f"{ref.id}: {fault}")
                    continue
                episodes.append(ref)
                files.append(frame_path(split, ref.private["start"]))
        if not episodes:
            raise DataError(f"{src}: no episode can be used; {bad[0] if bad else 'there is none'}")
        first = frame_path(src / episodes[0].file, episodes[0].private["start"])
        shapes = _shapes(first)
        cameras, proprio = self._cameras(first, shapes), self._proprio(first, shapes)
        if left := [key for key, (kind, shape) in shapes.items() if len(shape) > 1 and key not in cameras]:
            notes.append(f"cameras: {', '.join(left)} left out: no RGB pictures, or not asked for")
        return Scan(
            episodes=episodes,
            files=list(dict.fromkeys(files)),
            cameras=cameras,
            rate_hz=float(self.rate_hz),
            action=SPECS[self.action],
            proprio_dim=sum(int(np.prod(shapes[key][1])) for key in proprio),
            options={
                "action": self.action,
                "proprio": proprio,
                "episodes": self.episodes,
                "longest": self.longest,
                "image_orientation": self.image_orientation,
            },
            bad=bad,
            notes=[*notes, *remarks.unsaid_instructions(episodes)],
            frame_size=shapes[cameras[0]][1][:2],  # type: ignore[arg-type]
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        split, start, length = Path(self.src) / episode.file, episode.private["start"], episode.length
        first = frame_path(split, start)
        shapes = _shapes(first)
        proprio, action = self._proprio(first, shapes), [] if self.action == "none" else [self.action]
        rows = _rows(split, start, length, {POSE_KEY, *proprio, *action})
        return EpisodeData(
            frames={c: upright(_frames(split, c, start), self.image_orientation) for c in self._cameras(first, shapes)},
            times=np.arange(length) / float(self.rate_hz),
            actions=columns(rows, action, length),
            proprio=columns(rows, proprio, length),
            pose=pose_vectors(rows[POSE_KEY][:, :POSE], "euler_xyz"),
            instructions=said(episode.private["windows"], start, length) if self.episodes == "recorded" else None,
        )

    def _check_options(self) -> list[str]:
        problems = orientation_problems(self.image_orientation)
        problems += not_one_of(get_args(Action), action=self.action)
        problems += not_one_of(get_args(Episodes), episodes=self.episodes) + not_positive(rate_hz=self.rate_hz)
        if self.longest is not None and self.longest < 1:
            problems.append(f"longest: {self.longest} must be positive, or none")
        return problems

    def _windows(self, split: Path, notes: list[str]) -> tuple[list[Annotated], list[Path]]:
        """The annotated windows of a split, and the files that say them.

        Raises:
            DataError: Annotations are required and missing, or cannot be read.
        """
        folders = annotation_folders(split)
        if self.annotations is not None and self.annotations not in folders:
            there = ", ".join(folders) or "none"
            raise DataError(f"{split / self.annotations / FILE}: not there; folders with annotations: {there}")
        if not folders:
            if self.episodes == "annotated":
                raise DataError(f"{split / FOLDER / FILE}: not there; episodes=annotated needs it")
            return [], [split / TABLE]
        folder = self.annotations or folders[0]
        if folder != FOLDER and self.annotations is None:
            notes.append(f"instructions: {split.name} has no {FOLDER}; taken from {folder}")
        windows = read_annotations(split / folder / FILE)
        if self.episodes == "recorded" and (count := overlaps(windows)):
            notes.append(
                f"instructions: {count} of {len(windows)} annotated windows of {split.name} overlap an earlier one; "
                "from where they begin theirs holds"
            )
        return windows, [split / TABLE, split / folder / FILE]

    def _references(
        self, src: Path, split: Path, windows: Sequence[Annotated], notes: list[str]
    ) -> Iterator[EpisodeRef]:
        """The episodes of a split, sorted by first frame."""
        recorded = _recordings(split)
        if self.episodes == "annotated":
            seen: Counter[tuple[int, int]] = Counter()
            for window in windows:
                ends = window.start, window.end
                yield _reference(src, split, *ends, [window], again=seen[ends])
                seen[ends] += 1
            return
        long = 0
        for start, end in recorded:
            frames = end - start + 1
            parts = 1 if self.longest is None else -(-frames // self.longest)
            long += parts > 1
            for k in range(parts):
                first, last = start + frames * k // parts, start + frames * (k + 1) // parts - 1
                inside = [w for w in windows if w.start <= last and w.end >= first]
                yield _reference(src, split, first, last, inside)
        if long:
            notes.append(
                f"episodes: {long} of {len(recorded)} recordings of {split.name} are longer than {self.longest} frames "
                "and cut into parts; --set longest=none leaves them whole"
            )

    def _cameras(self, path: Path, shapes: Shapes) -> list[str]:
        """Raises:
        DataError: A requested camera is missing, or there is no camera.
        """
        rgb = [key for key, (kind, shape) in shapes.items() if kind == "uint8" and len(shape) == 3 and shape[2] == 3]
        cameras = list(self.cameras or sorted(rgb, reverse=True))  # rgb_static first
        if not cameras or not set(cameras) <= set(rgb):
            lost = [c for c in cameras if c not in rgb] or ["uint8 (H, W, 3)"]
            raise DataError(f"{path}: no pictures {', '.join(lost)}; it has {_listed(shapes)}")
        return cameras

    def _proprio(self, path: Path, shapes: Shapes) -> list[str]:
        """Raises:
        DataError: A requested key is missing.
        """
        keys = chosen(self.proprio, (POSE_KEY,), shapes)
        needed = [POSE_KEY, *keys, *([] if self.action == "none" else [self.action])]
        if lost := [key for key in needed if key not in shapes]:
            raise DataError(f"{path}: no {', '.join(dict.fromkeys(lost))}; it has {_listed(shapes)}")
        return keys


def find_splits(src: Path) -> list[Path]:
    """The split folders, which have a table of recordings: `src` itself, or training and validation in it.

    Raises:
        DataError: There is none.
    """
    found = [folder for folder in (src, *(src / name for name in SPLITS)) if (folder / TABLE).is_file()]
    if not found:
        raise DataError(f"{src}: no {TABLE} in it, nor in {' or '.join(SPLITS)}; give CALVIN's folder, e.g. task_D_D")
    return found


def frame_path(split: Path, number: int) -> Path:
    """The path of a frame's file."""
    return split / f"episode_{number:07d}.npz"


def _recordings(split: Path) -> list[tuple[int, int]]:
    """First and last frame of each recording, in order.

    Raises:
        DataError: The table is damaged.
    """
    path = split / TABLE
    check_lfs(path)
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{path}: cannot be read ({e})") from e
    if table.dtype.kind not in "iu" or table.ndim != 2 or table.shape[1:] != (2,) or (table[:, 0] > table[:, 1]).any():
        raise DataError(f"{path}: must hold (first, last) of each recording, not {table.dtype} {table.shape}")
    return sorted((int(start), int(end)) for start, end in table)


def _reference(
    src: Path, split: Path, start: int, end: int, windows: Sequence[Annotated], again: int = 0
) -> EpisodeRef:
    """The reference of an episode; `again`: how many earlier episodes have the same frames."""
    texts = list(dict.fromkeys(w.text for w in windows))
    return EpisodeRef(
        id=f"{split.name}/{start:07d}-{end:07d}" + (f"-{again + 1}" if again else ""),
        file="" if split == src else split.name,
        key=f"{start:07d}",
        length=end - start + 1,
        task=windows[0].task if len(windows) == 1 else "",
        instruction=texts[0] if texts else "",
        split=split.name,
        private={"start": start, "windows": tuple(windows)},
    )


def _frame_numbers(split: Path) -> set[int]:
    """Numbers of the existing frames, from one listing of the folder.

    Raises:
        DataError: It cannot be listed.
    """
    try:
        names = os.listdir(split)
    except OSError as e:
        raise DataError(f"{split}: cannot be listed: {e.strerror or e}") from e
    digits = (name[8:-4] for name in names if name.startswith("episode_") and name.endswith(".npz"))
    return {int(number) for number in digits if number.isdigit()}


def _missing(split: Path, ref: EpisodeRef, there: set[int]) -> str | None:
    """Why an episode cannot be used, judged by which frames exist."""
    start = ref.private["start"]
    lost = [n for n in range(start, start + ref.length) if n not in there]
    if not lost:
        return None
    return f"{len(lost)} of its {ref.length} frames are not there, the first is {frame_path(split, lost[0]).name}"


def _load(path: Path, keys: Iterable[str]) -> list[np.ndarray]:
    """Arrays of one frame's file.

    Raises:
        DataError: It is damaged, or lacks one of them.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[key] for key in keys]
    except KeyError as e:
        raise DataError(f"{path.name}: {e.args[0]}") from e
    except DAMAGE as e:
        check_lfs(path)
        raise DataError(f"{path.name}: cannot be read ({e})") from e


def _shapes(path: Path) -> Shapes:
    """Key → type and shape of one frame's arrays.

    Raises:
        DataError: It is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: (str((a := arrays[key]).dtype), a.shape) for key in arrays.files}
    except DAMAGE as e:
        check_lfs(path)
        raise DataError(f"{path}: cannot be read ({e})") from e


def _listed(shapes: Shapes) -> str:
    return ", ".join(f"{key} {kind} {shape}" for key, (kind, shape) in shapes.items()) or "nothing"


def _rows(split: Path, start: int, length: int, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Numbers of `length` frames, (length, …) for each key.

    Raises:
        DataError: A frame is damaged, or of another shape.
    """
    names = sorted(keys)
    rows = [_load(frame_path(split, start + t), names) for t in range(length)]
    for k, name in enumerate(names):
        for t, row in enumerate(rows):
            if row[k].shape != rows[0][k].shape:
                raise DataError(
                    f"{frame_path(split, start + t).name}: {name} is {row[k].shape}, not {rows[0][k].shape}"
                )
    return {name: np.stack([row[k] for row in rows]) for k, name in enumerate(names)}


def _frames(split: Path, camera: str, start: int) -> Frames:
    def frames(indices: Sequence[int]) -> Iterator[np.ndarray]:
        for i in indices:
            (image,) = _load(frame_path(split, start + i), [camera])
            yield image

    return frames
