"""What a format's Reader tells the driver: which episodes there are, and what one episode holds.

A Reader gives the dataset's own moments and numbers. What all formats need (another rate, another size, one action
convention, no-ops dropped, a split) is the driver's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from data_tools.formats.rotations import Rotation
from stamo_dist.errors import DataError

_LFS = b"version https://git-lfs"

#: Given increasing frame numbers of an episode, these frames in order: upright RGB (H, W, 3) uint8, or an encoded image
#: (JPEG, PNG, …) as bytes, which must be upright too. It decodes what it is asked for, lazily.
Frames = Callable[[Sequence[int]], Iterable[np.ndarray | bytes]]


#: Rows read at once, at least: a compressed chunk often holds several, and would be unpacked again for each.
RUN = 32


@dataclass(frozen=True)
class ActionSpec:
    """What the numbers of an action mean, so that the driver can express them in one convention.

    `mode`: "delta": a displacement from the current pose; "absolute": a pose to reach; "velocity": per second;
    "other": not an end-effector motion (joints, torques), kept as it is but for the gripper.
    """

    dim: int
    text: str  # for people, e.g. "OSC_POSE delta, 1 = 5 cm or 0.5 rad, gripper -1 open +1 close"
    mode: Literal["delta", "absolute", "velocity", "other"]
    translation: tuple[int, ...] = ()  # dimensions of x, y, z
    metres: float = 1.0  # metres (or metres per second) of one unit
    rotation: tuple[int, ...] = ()  # dimensions of the rotation
    rotation_kind: Rotation = "rotvec"
    radians: float = 1.0  # radians of one unit, for rotvec and euler_xyz
    euler_added: bool = False  # a delta's euler_xyz is to be added to the pose's angles, as CALVIN's
    gripper: int | None = None  # dimension of the gripper command
    gripper_open: float = 1.0  # its value when open
    gripper_closed: float = 0.0
    unstated: str = ""  # how to say what it is, where "other" was not said but for want of a word: it may be deltas


@dataclass(frozen=True)
class EpisodeRef:
    """Where one episode is, and what it is about."""

    id: str  # unique in the source, stable
    file: str  # relative to the source
    key: str  # within the file
    length: int  # frames; may be an estimate, the same on every scan
    task: str = ""
    instruction: str = ""
    split: str = ""  # the dataset's own split, where it has one
    meta: Mapping[str, Any] = field(default_factory=dict)  # JSON; kept in the episode table
    private: Mapping[str, Any] = field(default_factory=dict)  # the reader's own notes; not kept
    told: bool = False  # the user gave the instruction, which then holds throughout


@dataclass(frozen=True)
class Film:
    """The video that a camera's frames are in, and when: for a second look that shares nothing with `frames`.

    Attributes:
        path: The file.
        seconds: float64 (T,); when each frame is shown, since the file begins to play.
        orientation: How pictures are stored, where not upright.
    """

    path: Path
    seconds: np.ndarray
    orientation: str | None = None


@dataclass(frozen=True)
class EpisodeData:
    """One episode of T moments as the dataset has it.

    Attributes:
        frames: By camera.
        times: float64 (T,), seconds, increasing; when each frame was taken.
        actions: (T, A) in the dataset's own convention; actions[t] is taken at frame t. A = 0: has none.
        proprio: (T, P).
        pose: (T, 6) end-effector position in m and rotation vector in rad, needed to turn absolute actions into deltas.
        instructions: Each frame's own, T of them, where they change within the episode; None: the episode's throughout.
        films: By camera, where frames are in videos.
    """

    frames: Mapping[str, Frames]
    times: np.ndarray
    actions: np.ndarray
    proprio: np.ndarray
    pose: np.ndarray | None = None
    instructions: Sequence[str] | None = None
    films: Mapping[str, Film] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """What a source holds.

    `bad` lists the episodes that cannot be used, as "EPISODE: reason"; `notes` says, a line each, what was guessed,
    left out or not found, for the screen and the manifest.
    """

    episodes: list[EpisodeRef]
    files: list[Path]  # what the fingerprint is made of
    cameras: list[str]
    rate_hz: float  # nominal frames per second
    action: ActionSpec | None
    proprio_dim: int
    options: dict[str, Any]  # what the reader settled on, for the manifest
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    frame_size: tuple[int, int] | None = None  # (H, W) of the first camera's frames, where the files say


class SourceReader(Protocol):
    """One source format. Pickled into the converter's processes, so open files lazily.

    A format is a dataclass of `src` and its own options, each with a default; its docstring's Args say what they mean,
    in the order in which they are shown, or in which base class it stands (`NAME, NAME: See `BASE`.`).
    """

    def scan(self) -> Scan:
        """Find the episodes without decoding them.

        Raises:
            DataError: All problems of the source at once.
        """

    def read(self, episode: EpisodeRef) -> EpisodeData:
        """Read one episode.

        Raises:
            DataError: This episode cannot be read; says why, without its id. Also while iterating over frames.
        """


def pick(frames: np.ndarray) -> Frames:
    """Frames that are in memory already, (T, H, W, 3)."""
    return lambda indices: (frames[i] for i in indices)


def in_runs(rows: Any, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Rows of a stored array (HDF5, zarr) at increasing indices, read in runs of whole chunks."""
    chunk = rows.chunks[0] if rows.chunks else 1
    run = chunk * -(-RUN // chunk)
    block, start = np.empty(0), 0
    for i in indices:
        if not start <= i < start + len(block):
            start = i - i % run
            block = rows[start : start + run]
        yield block[i - start]


def columns(arrays: Any, keys: Sequence[str], length: int, start: int = 0) -> np.ndarray:
    """Rows of stored arrays (HDF5, zarr) from `start` on, side by side, (length, D); D = 0 without keys."""
    parts = [np.asarray(arrays[key][start : start + length]).reshape(length, -1) for key in keys]
    return np.concatenate(parts, axis=1) if parts else np.zeros((length, 0), np.float32)


def chosen(asked: Sequence[str], usual: Sequence[str], there: Container[str]) -> list[str]:
    """The keys of an option: as asked ("none": none), else those of the usual ones that are there."""
    keys = [asked] if isinstance(asked, str) else list(asked or ())
    if not keys:
        return [key for key in usual if key in there]
    return [] if keys == ["none"] else keys


def walk(root: Path) -> Iterator[Path]:
    """Files below a folder, sorted, hidden ones left out; each folder once, linked ones too, by its own path if it can.

    Raises:
        DataError: A folder cannot be listed.
    """
    seen: set[str] = set()
    found: list[Path] = []
    todo = [str(root)]
    while todo:  # links come after the folders that are there in their own right
        for folder, folders, files in os.walk(todo.pop(0), onerror=_cannot_list):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            todo += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
            found += [Path(folder) / name for name in files if not name.startswith(".")]
    return iter(sorted(found))


def _cannot_list(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder that is not there has no files
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror or error}") from error


def check_lfs(path: Path) -> None:
    """Raises:
    DataError: The file is only Git LFS's pointer to it, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS)) == _LFS
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from e
    if pointer:
        raise DataError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in the dataset")


def check_there(path: Path) -> None:
    """Raises:
    DataError: The file is a link to nothing, or only Git LFS's pointer.
    """
    if not path.exists():
        raise DataError(f"{path}: a link to {os.readlink(path)}, which is not there; bring it back or remove the link")
    check_lfs(path)


def find_files(src: Path, suffixes: Sequence[str]) -> list[Path]:
    """`src` itself if it is a file, else the files below it with one of these suffixes, as `walk` finds them.

    Raises:
        DataError: There is none, one is a Git LFS pointer or a link to nothing, or a folder cannot be listed.
    """
    if not src.is_file() and not src.is_dir():
        raise DataError(f"{src}: no such file or folder")
    files = [src] if src.is_file() else [p for p in walk(src) if p.suffix.lower() in suffixes and not p.is_dir()]
    if not files:
        raise DataError(f"{src}: no {' or '.join(suffixes)} file in this folder")
    for path in files:
        check_there(path)
    return files
