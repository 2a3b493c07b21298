"""One episode on its way into the shards: the part of a conversion that knows moments, actions and images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from data_tools.convert import timing
from data_tools.convert.actions import map_actions, no_ops
from data_tools.convert.guard import unforeseen
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, SourceReader
from data_tools.images import encode_frames
from stamo_dist.errors import DataError, StamoError

#: What reading a damaged file may raise besides DataError.
DAMAGE = (OSError, ValueError, KeyError, IndexError, EOFError)


@dataclass(frozen=True)
class Processing:
    """How every episode is processed."""

    size: int
    fit: str = "crop"
    quality: int = 95
    rate_hz: float | None = None
    action: str = "delta"
    drop_noops: bool = False


@dataclass(frozen=True)
class Converted:
    """K moments as they are stored: JPEGs by camera, times float64 (K,), float32 vectors (K, D) by column, K texts."""

    images: dict[str, list[bytes]]
    times: np.ndarray
    vectors: dict[str, np.ndarray]
    instructions: list[str]
    digest: str  # of the rows as the dataset has them

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class KeptTimesteps:
    """The K moments of an episode that are kept: their frames' numbers in it; times, vectors and texts as stored."""

    data: EpisodeData
    kept: np.ndarray
    times: np.ndarray
    vectors: dict[str, np.ndarray]
    instructions: list[str]


@contextmanager
def _readable() -> Iterator[None]:
    """Turns every exception that reading may raise into a DataError."""
    try:
        yield
    except DAMAGE as e:
        raise DataError(f"cannot be read ({type(e).__name__}: {e})") from e
    except StamoError:
        raise
    except Exception as e:
        raise unforeseen("cannot be read", e) from e


def read_moments(
    reader: SourceReader,
    episode: EpisodeRef,
    processing: Processing,
    *,
    cameras: Sequence[str],
    spec: ActionSpec | None,
    proprio_dim: int,
) -> KeptTimesteps:
    """Read an episode without its images.

    Raises:
        DataError: Why this episode cannot be used.
    """
    with _readable():
        data = reader.read(episode)
        _check(data, cameras, spec, proprio_dim)
        kept, vectors, times = _moments(data, processing, spec)
    texts = [episode.instruction] * len(kept)
    if data.instructions is not None and not episode.told:
        texts = [data.instructions[t] for t in kept.tolist()]
    return KeptTimesteps(data, kept, times, vectors, texts)


def read_episode(
    reader: SourceReader,
    episode: EpisodeRef,
    processing: Processing,
    *,
    cameras: Sequence[str],
    spec: ActionSpec | None,
    proprio_dim: int,
) -> Converted:
    """Read an episode and convert it to the form in which shards store it.

    Raises:
        DataError: Why this episode cannot be used.
    """
    read = read_moments(reader, episode, processing, cameras=cameras, spec=spec, proprio_dim=proprio_dim)
    with _readable():
        images = {c: _encode(read.data, c, read.kept, processing) for c in cameras}
    return Converted(images, read.times, read.vectors, read.instructions, digest(read.data, episode))


def read_digest(reader: SourceReader, episode: EpisodeRef) -> str:
    """The digest of an episode, computed without reading its frames; "" if it cannot be read."""
    try:
        return digest(reader.read(episode), episode)
    except (DataError, *DAMAGE):
        return ""


def digest(data: EpisodeData, episode: EpisodeRef) -> str:
    """A digest of an episode's times, actions, proprioception and texts."""
    told = hashlib.sha256()
    for values in (data.times, data.actions, data.proprio):
        told.update(f"{values.shape}\0".encode() + np.ascontiguousarray(values, np.float64).tobytes())
    told.update(json.dumps([episode.instruction, *(data.instructions or ())]).encode())
    return told.hexdigest()[:16]


def _encode(data: EpisodeData, camera: str, kept: np.ndarray, processing: Processing) -> list[bytes]:
    """The kept frames of one camera as JPEGs.

    Raises:
        DataError: A frame is missing or corrupt.
    """
    numbers = kept.tolist()
    try:
        return encode_frames(data.frames[camera](numbers), numbers, processing.size, processing.fit, processing.quality)
    except DataError as e:
        raise DataError(f"{camera}: {e}") from e


def _moments(
    data: EpisodeData, processing: Processing, spec: ActionSpec | None
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Which frames are kept, their vectors, and their times from 0."""
    times, actions, pose = data.times.astype(np.float64), data.actions, data.pose
    seconds = timing.durations(times)
    steps = np.arange(len(times))
    if processing.drop_noops:
        acts = ~no_ops(spec, actions, pose)
        if not acts.any():
            raise DataError("every step is a no-op")
        times, steps = timing.close_up(seconds, acts), steps[acts]
        actions, seconds, pose = actions[acts], seconds[acts], None if pose is None else pose[acts]
    kept = timing.resample(times, processing.rate_hz)
    vectors = {"proprio": data.proprio[steps[kept]]}
    if spec is not None and spec.dim:
        vectors["original_action"] = actions[kept]
        vectors["action"] = map_actions(spec, processing.action, actions, kept, seconds, pose)
    stored = {name: np.ascontiguousarray(values, np.float32) for name, values in vectors.items() if values.shape[1]}
    return steps[kept], stored, times[kept] - times[0]


def _check(data: EpisodeData, cameras: Sequence[str], spec: ActionSpec | None, proprio_dim: int) -> None:
    """Raises:
    DataError: The episode differs from what the scan reported.
    """
    lengths = {"frames": len(data.times), "actions": len(data.actions), "proprio": len(data.proprio)}
    if data.pose is not None:
        lengths["pose"] = len(data.pose)
    if data.instructions is not None:
        lengths["instructions"] = len(data.instructions)
    if len(set(lengths.values())) > 1:
        raise DataError("lengths differ: " + ", ".join(f"{name} {n}" for name, n in lengths.items()))
    if not len(data.times):
        raise DataError("no frames")
    for name, values, dim in (
        ("actions", data.actions, spec.dim if spec else 0),
        ("proprio", data.proprio, proprio_dim),
    ):
        if values.dtype.kind not in "fiub":
            raise DataError(f"{name} are {values.dtype}, not numbers")
        if values.shape[1:] != (dim,):
            raise DataError(f"{name} are {values.shape}, expected (T, {dim})")
    numbers = {"actions": data.actions, "proprio": data.proprio, "pose": data.pose}
    if broken := [name for name, values in numbers.items() if values is not None and not np.isfinite(values).all()]:
        raise DataError(f"{' and '.join(broken)} are not finite")
    if not np.isfinite(data.times).all() or (np.diff(data.times) <= 0).any():
        raise DataError("the times of its frames do not increase")
    if missing := [camera for camera in cameras if camera not in data.frames]:
        raise DataError(f"no camera {', '.join(missing)}")
