"""Converting slices of whole episodes into MDS shards, in any number of processes on any number of machines."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from data_tools.convert.episode import Processing, read_episode
from data_tools.convert.progress import ConversionProgress, Show
from data_tools.formats.source import ActionSpec, EpisodeRef, SourceReader
from data_tools.workers import spawned, usable_cores
from stamo_dist.data.schema import Manifest, columns
from stamo_dist.errors import DataError

if TYPE_CHECKING:
    from data_tools.convert.mds import EpisodeWriter

REPORT = "slice.json"
#: File in the folder of all slices that identifies their plan; removed once they are merged.
STAMP = "plan.json"
#: Fewer frames than this are converted in one process, as starting another takes seconds.
FRAMES_WORTH_A_PROCESS = 4096
#: Polling interval (s) for slices that another run is converting.
PATIENCE = 0.5
#: Trying again does not help.
_NO_PLACE = {errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True, eq=False)
class Slice:
    """Consecutive episodes of one split; `folder` gets its final name only when it is complete."""

    split: str
    number: int
    episodes: tuple[EpisodeRef, ...]
    folder: Path

    @property
    def frames(self) -> int:
        return sum(e.length for e in self.episodes)

    def report(self) -> dict[str, Any] | None:
        """The report that the conversion of this slice wrote, None if it has not finished."""
        path = self.folder / REPORT
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None


@dataclass(frozen=True)
class ConversionJob:
    """The settings that all slices of a conversion share."""

    reader: SourceReader
    manifest: Manifest
    spec: ActionSpec | None
    processing: Processing
    shard_bytes: int


def run(job: ConversionJob, work: Sequence[Slice], processes: int | None, quiet: bool) -> Iterator[list[str]]:
    """Convert the slices that are not complete; yields each slice's skipped episodes ("EPISODE: reason").

    Waits for slices that another run is converting, and takes them over if that run dies.
    """
    todo = []
    for part in work:
        if (report := part.report()) is None:
            todo.append(part)
        else:
            yield report["skipped"]
    total, missing = sum(part.frames for part in work), sum(part.frames for part in todo)
    if processes is None:
        processes = min(usable_cores(), 1 + missing // FRAMES_WORTH_A_PROCESS)
    processes = min(processes, len(todo))
    with ConversionProgress(total, total - missing, quiet) as progress:
        convert = _one_by_one if processes <= 1 else _in_processes(processes)
        while todo:
            busy = []
            for part, skipped in convert(job, todo, progress.show):
                if skipped is None:
                    busy.append(part)
                else:
                    yield skipped
            if todo := busy:
                time.sleep(PATIENCE)


_Results = Iterator[tuple[Slice, list[str] | None]]


def _one_by_one(job: ConversionJob, todo: Sequence[Slice], show: Show) -> _Results:
    for part in todo:
        yield part, _convert(job, part, show)


def _in_processes(processes: int) -> Callable[[ConversionJob, Sequence[Slice], Show], _Results]:
    def convert(job: ConversionJob, todo: Sequence[Slice], show: Show) -> _Results:
        counts = multiprocessing.get_context("spawn").Array("q", 2)
        with spawned(processes, _start_worker, counts) as pool:
            parts = {pool.submit(_convert_in_worker, job, part): part for part in todo}
            running = set(parts)
            shown = (0, 0)
            while running:
                done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                now = (counts[0], counts[1])
                show(now[0] - shown[0], now[1] - shown[1])
                shown = now
                for future in done:
                    try:
                        yield parts[future], future.result()
                    except BrokenProcessPool as e:
                        raise DataError(
                            "a converter process died (out of memory?); run again with fewer --processes"
                        ) from e

    return convert


_counts: Any = None


def _start_worker(counts: Any) -> None:
    global _counts
    _counts = counts


def _convert_in_worker(job: ConversionJob, part: Slice) -> list[str] | None:
    def count(frames: int, skipped: int) -> None:
        with _counts.get_lock():
            _counts[0] += frames
            _counts[1] += skipped

    return _convert(job, part, count)


@contextmanager
def held(path: Path, timeout: float) -> Iterator[bool]:
    """Hold a lock that the kernel frees when its process dies; False if another one has it until the timeout.

    A file system without such locks gives every caller True; unique names and renames keep the result correct.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        yield False
        return
    except NotImplementedError:
        pass
    try:
        yield True
    finally:
        lock.release()


def _convert(job: ConversionJob, part: Slice, show: Show) -> list[str] | None:
    """Write one slice under a process-specific name and rename it; None if another run is converting it."""
    try:
        _check_there(part)  # before locking, which would create the folder again
        with held(part.folder.with_name(f"{part.folder.name}.lock"), 0) as mine:
            if not mine:
                return None
            _check_there(part)
            if (report := part.report()) is None:
                report = _write(job, part, show)
            else:
                show(part.frames, len(report["skipped"]))
    except OSError as e:
        raise DataError(cannot_write(part.folder.parent, e)) from e
    return report["skipped"]


def _check_there(part: Slice) -> None:
    """Raises:
    DataError: The slices were merged by another run, or removed.
    """
    if not (part.folder.parent / STAMP).is_file():
        raise DataError(f"{part.folder.parent}: was removed while it was being written; run again")


def cannot_write(folder: Path, error: OSError) -> str:
    """The error message for a full disk or a folder that cannot be written."""
    reason = error.strerror or str(error)
    way = "name another OUT" if error.errno in _NO_PLACE else "what is finished stays, run again to continue"
    return f"{folder}: cannot be written: {reason}; {way}"


def _write(job: ConversionJob, part: Slice, show: Show) -> dict[str, Any]:
    host = socket.gethostname()
    for old in part.folder.parent.glob(f".{part.folder.name}.{host}.*.tmp"):  # left by killed runs
        shutil.rmtree(old, ignore_errors=True)
    temporary = part.folder.with_name(f".{part.folder.name}.{host}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        report = _fill(job, part, temporary, show)
        (temporary / REPORT).write_text(json.dumps(report))
        try:
            os.replace(temporary, part.folder)
        except OSError:
            # Without locks another run may have finished first; its slice has the same bytes.
            if (part.report()) is None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _fill(job: ConversionJob, part: Slice, folder: Path, show: Show) -> dict[str, Any]:
    from data_tools.convert.mds import EpisodeWriter

    manifest = job.manifest
    layout = columns(
        action=manifest.action_dim, original_action=manifest.original_action_dim, proprio=manifest.proprio_dim
    )
    writers = {c: EpisodeWriter(folder / c, layout, job.shard_bytes) for c in manifest.cameras}
    converted: list[dict[str, Any]] = []
    skipped: list[str] = []
    for episode in part.episodes:
        reasons = len(skipped)
        try:
            texts, digest = _convert_episode(job, episode, writers)
            changes = [t for t in range(1, len(texts)) if texts[t] != texts[t - 1]]
            converted.append(
                {
                    "id": episode.id,
                    "length": len(texts),
                    "instruction": texts[0],
                    "later_instructions": {t: texts[t] for t in changes},
                    "task": episode.task,
                    "meta": dict(episode.meta),
                    "digest": digest,
                }
            )
        except DataError as e:
            skipped.append(f"{episode.id}: {e}")
        show(episode.length, len(skipped) - reasons)
    for writer in writers.values():
        writer.finish()
    return {"episodes": converted, "skipped": skipped}


def _convert_episode(
    job: ConversionJob, episode: EpisodeRef, writers: dict[str, EpisodeWriter]
) -> tuple[list[str], str]:
    """Encode all cameras before writing any, so that a bad frame leaves all cameras with the same episodes.

    Returns the instruction of each frame, and the episode's digest.
    """
    manifest = job.manifest
    data = read_episode(
        job.reader,
        episode,
        job.processing,
        cameras=manifest.cameras,
        spec=job.spec,
        proprio_dim=manifest.proprio_dim,
    )
    shared = {
        "episode": episode.id,
        "length": len(data),
        "source": manifest.name,
        "convention": manifest.convention,
    }
    each: dict[str, Sequence[bytes] | np.ndarray] = {
        "t": np.arange(len(data), dtype=np.int64),
        "time": data.times,
        "instruction": [text.encode() for text in data.instructions],
        **data.vectors,
    }
    encoded = {
        camera: writer.encode({**shared, "camera": camera}, {**each, "image": data.images[camera]})
        for camera, writer in writers.items()
    }
    for camera, writer in writers.items():
        writer.write_episode(encoded[camera])
    return data.instructions, data.digest
