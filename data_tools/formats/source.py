"""The interface between a format's Reader and the driver: which episodes exist, and the content of one episode.

A Reader returns the dataset's own timesteps and numbers. The driver does what all formats need: resampling, resizing,
one action convention, dropping no-ops, splitting.
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
#: (JPEG, PNG, …) as bytes, which must be upright too. Only the requested frames are decoded, lazily.
Frames = Callable[[Sequence[int]], Iterable[np.ndarray | bytes]]


#: Minimum rows per read: a compressed chunk often holds several and would be decompressed for each.
RUN = 32


@dataclass(frozen=True)
class ActionSpec:
    """What the numbers of an action mean, so that the driver can express them in one convention.

    `mode`: "delta": a displacement from the current pose; "absolute": a pose to reach; "velocity": per second;
    "other": not an end-effector motion (joints, torques), kept as it is but for the gripper.
    """

    dim: int
    text: str  # description, e.g. "OSC_POSE delta, 1 = 5 cm or 0.5 rad, gripper -1 open +1 close"
    mode: Literal["delta", "absolute", "velocity", "other"]
    translation: tuple[int, ...] = ()  # dimensions of x, y, z
    metres: float = 1.0  # metres (or metres per second) of one unit
    rotation: tuple[int, ...] = ()  # dimensions of the rotation
    rotation_kind: Rotation = "rotvec"
    radians: float = 1.0  # radians of one unit, for rotvec and euler_xyz
    euler_added: bool = False  # a delta's euler_xyz is added to the pose's Euler angles, as in CALVIN
    gripper: int | None = None  # dimension of the gripper command
    gripper_open: float = 1.0  # its value when open
    gripper_closed: float = 0.0
    unstated: str = ""  # how the user can declare it, if "other" is only a default: the actions may be deltas


@dataclass(frozen=True)
class EpisodeRef:
    """Location and metadata of one episode."""

    id: str  # unique in the source, stable
    file: str  # relative to the source
    key: str  # within the file
    length: int  # frames; may be an estimate, the same on every scan
    task: str = ""
    instruction: str = ""
    split: str = ""  # the dataset's own split, if it has one
    meta: Mapping[str, Any] = field(default_factory=dict)  # JSON; kept in the episode table
    private: Mapping[str, Any] = field(default_factory=dict)  # for the reader's own use; not stored
    told: bool = False  # the user gave the instruction, which then applies to all frames


@dataclass(frozen=True)
class Film:
    """The video of a camera's frames and their times, for checking frames by a second, independent decoder.

    Attributes:
        path: The file.
        seconds: float64 (T,); time of each frame since the start of playback.
        orientation: How images are stored, if not upright.
    """

    path: Path
    seconds: np.ndarray
    orientation: str | None = None


@dataclass(frozen=True)
class EpisodeData:
    """One episode of T timesteps as stored in the dataset.

    Attributes:
        frames: By camera.
        times: float64 (T,), seconds, increasing; when each frame was taken.
        actions: (T, A) in the dataset's own convention; actions[t] is taken at frame t. A = 0: no actions.
        proprio: (T, P).
        pose: (T, 6) end-effector position in m and rotation vector in rad, needed to turn absolute actions into deltas.
        instructions: T instructions, one per frame, if they change within the episode; None: the episode's.
        films: By camera, if frames are stored in videos.
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
    """The content of a source.

    `bad` lists the episodes that cannot be used, as "EPISODE: reason"; `notes` lists, one line each, what was guessed,
    left out or not found, for the terminal and the manifest.
    """

    episodes: list[EpisodeRef]
    files: list[Path]  # files whose names, sizes and times make the fingerprint
    cameras: list[str]
    rate_hz: float  # nominal frames per second
    action: ActionSpec | None
    proprio_dim: int
    options: dict[str, Any]  # the resolved options, for the manifest
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    frame_size: tuple[int, int] | None = None  # (H, W) of the first camera's frames, if known


class SourceReader(Protocol):
    """One source format. Pickled into the converter's processes, so open files lazily.

    A format is a dataclass of `src` and its own options, each with a default. The Args section of its docstring
    explains them in display order, or refers to a base class (`NAME, NAME: See `BASE`.`).
    """

    def scan(self) -> Scan:
        """Find the episodes without decoding them.

        Raises:
            DataError: All problems of the source at once.
        """

    def read(self, episode: EpisodeRef) -> EpisodeData:
        """Read one episode.

        Raises:
            DataError: This episode cannot be read; gives the reason without the id. Also while iterating over frames.
        """


def pick(frames: np.ndarray) -> Frames:
    """Frames of an array in memory, (T, H, W, 3)."""
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
    """Rows of stored arrays (HDF5, zarr) from `start` on, concatenated, (length, D); D = 0 without keys."""
    parts = [np.asarray(arrays[key][start : start + length]).reshape(length, -1) for key in keys]
    return np.concatenate(parts, axis=1) if parts else np.zeros((length, 0), np.float32)


def chosen(asked: Sequence[str], usual: Sequence[str], there: Container[str]) -> list[str]:
    """The keys of an option: as given ("none": none), else the usual keys that exist."""
    keys = [asked] if isinstance(asked, str) else list(asked or ())
    if not keys:
        return [key for key in usual if key in there]
    return [] if keys == ["none"] else keys


def walk(root: Path) -> Iterator[Path]:
    """Files below a folder, sorted, without hidden ones; a linked folder is visited once, by its real path if possible.

    Raises:
        DataError: A folder cannot be listed.
    """
    seen: set[str] = set()
    found: list[Path] = []
    todo = [str(root)]
    while todo:  # links come after real folders
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
    if not isinstance(error, FileNotFoundError):  # a missing folder has no files
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror or error}") from error


def check_lfs(path: Path) -> None:
    """Raises:
    DataError: The file is a Git LFS pointer, or cannot be read.
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
    DataError: The file is a broken link or a Git LFS pointer.
    """
    if not path.exists():
        raise DataError(f"{path}: a link to {os.readlink(path)}, which is not there; bring it back or remove the link")
    check_lfs(path)


def find_files(src: Path, suffixes: Sequence[str]) -> list[Path]:
    """`src` itself if it is a file, else the files below it with one of these suffixes, as `walk` finds them.

    Raises:
        DataError: There is none, one is a Git LFS pointer or a broken link, or a folder cannot be listed.
    """
    if not src.is_file() and not src.is_dir():
        raise DataError(f"{src}: no such file or folder")
    files = [src] if src.is_file() else [p for p in walk(src) if p.suffix.lower() in suffixes and not p.is_dir()]
    if not files:
        raise DataError(f"{src}: no {' or '.join(suffixes)} file in this folder")
    for path in files:
        check_there(path)
    return files
