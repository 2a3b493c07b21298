"""Converting slices of whole episodes into MDS shards, in parallel, and joining them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.source import EpisodeData, EpisodeRef, Reader
from data_tools.workers import spawned, usable_cores
from stamo_dist.data.schema import COLUMNS, Manifest
from stamo_dist.errors import DataError

if TYPE_CHECKING:
    from data_tools.mds import EpisodeWriter

REPORT = "slice.json"
#: A process of its own takes seconds to start; below this many frames it does not pay.
FRAMES_WORTH_A_PROCESS = 4096


@dataclass(frozen=True)
class Slice:
    """Consecutive episodes of one split; `folder` appears under its name only when it is whole."""

    split: str
    number: int
    episodes: tuple[EpisodeRef, ...]
    folder: Path

    @property
    def frames(self) -> int:
        return sum(e.length for e in self.episodes)

    def report(self) -> dict[str, Any] | None:
        """What the conversion of this slice wrote, None if it has not finished."""
        path = self.folder / REPORT
        return json.loads(path.read_text()) if path.is_file() else None

    def converted(self) -> list[dict[str, Any]]:
        """id, length, instruction and task of each episode in stored order."""
        report = self.report()
        return report["episodes"] if report else []


@dataclass(frozen=True)
class Job:
    """What every slice of a conversion has in common."""

    reader: Reader
    manifest: Manifest
    quality: int
    shard_bytes: int


def run(job: Job, work: Sequence[Slice], processes: int | None, quiet: bool) -> Iterator[list[str]]:
    """Convert the slices that are not whole yet; yields each slice's skipped episodes ("EPISODE: reason")."""
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
    with _progress(total, total - missing, quiet) as show:
        if processes <= 1:
            for part in todo:
                yield _convert(job, part, show)
            return
        yield from _run_in_processes(job, todo, processes, show)


def _run_in_processes(job: Job, todo: Sequence[Slice], processes: int, show: Any) -> Iterator[list[str]]:
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    with spawned(processes, _start_worker, counter) as pool:
        running = {pool.submit(_convert_in_worker, job, part) for part in todo}
        shown = 0
        while running:
            done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            show((now := counter.value) - shown)
            shown = now
            for future in done:
                try:
                    yield future.result()
                except BrokenProcessPool as e:
                    raise DataError(
                        "a converter process died (out of memory?); run again with fewer --processes"
                    ) from e


_counter: Any = None


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter


def _convert_in_worker(job: Job, part: Slice) -> list[str]:
    def count(frames: int) -> None:
        with _counter.get_lock():
            _counter.value += frames

    return _convert(job, part, count)


def _convert(job: Job, part: Slice, advance: Any) -> list[str]:
    """Write one slice under a temporary name, then rename it."""
    from data_tools.mds import EpisodeWriter

    temporary = part.folder.with_name(part.folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        writers = {c: EpisodeWriter(temporary / c, COLUMNS, job.shard_bytes) for c in job.manifest.cameras}
        converted, skipped = [], []
        for episode in part.episodes:
            try:
                length = _convert_episode(job, episode, writers)
                converted.append(
                    {"id": episode.id, "length": length, "instruction": episode.instruction, "task": episode.task}
                )
            except DataError as e:
                skipped.append(f"{episode.id}: {e}")
            advance(episode.length)
        for writer in writers.values():
            writer.finish()
        (temporary / REPORT).write_text(json.dumps({"episodes": converted, "skipped": skipped}))
        os.replace(temporary, part.folder)
    except OSError as e:
        raise DataError(f"{part.folder.parent}: cannot be written: {e.strerror or e}") from e
    return skipped


def _convert_episode(job: Job, episode: EpisodeRef, writers: dict[str, EpisodeWriter]) -> int:
    """Encode every camera before writing any, so that a bad frame leaves no camera ahead of the others."""
    data = job.reader.read(episode)
    encoded = {camera: encode_frames(data.frames[camera], job.manifest.image_size, job.quality) for camera in writers}
    length = _check_episode(job.manifest, data, encoded)
    actions, proprio = data.actions.astype(np.float32), data.proprio.astype(np.float32)
    for camera, writer in writers.items():
        writer.write_episode(
            {
                "image": encoded[camera][t],
                "episode": episode.id,
                "t": t,
                "length": length,
                "action": actions[t],
                "proprio": proprio[t],
                "instruction": episode.instruction,
                "source": job.manifest.name,
                "camera": camera,
                "convention": job.manifest.convention,
            }
            for t in range(length)
        )
    return length


def _check_episode(manifest: Manifest, data: EpisodeData, encoded: dict[str, list[bytes]]) -> int:
    lengths = {camera: len(images) for camera, images in encoded.items()}
    lengths |= {"actions": len(data.actions), "proprio": len(data.proprio)}
    if len(set(lengths.values())) > 1 or not len(data.actions):
        raise DataError("lengths differ: " + ", ".join(f"{k} {n}" for k, n in lengths.items()))
    if not np.isfinite(data.actions).all() or not np.isfinite(data.proprio).all():
        raise DataError("actions or proprio are not finite")
    for what, values, dim in (
        ("actions", data.actions, manifest.action_dim),
        ("proprio", data.proprio, manifest.proprio_dim),
    ):
        if values.shape[1:] != (dim,):
            raise DataError(f"{what} are {values.shape}, expected (T, {dim})")
    return len(data.actions)


def encode_frames(frames: Any, size: int, quality: int) -> list[bytes]:
    """JPEG-encode frames (H, W, 3) uint8 at (size, size): cropped to the middle square, resized with Lanczos.

    Colour keeps its full resolution below 128 px, where halving it is visible; above, it is halved as usual.
    """
    import simplejpeg
    from PIL import Image

    subsampling = "444" if size < 128 else "420"
    encoded = []
    for frame in frames:
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise DataError(f"a frame is {frame.dtype} {frame.shape}, expected uint8 RGB")
        height, width = frame.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = frame[top : top + side, left : left + side]
        if side != size:
            square = np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))
        encoded.append(
            simplejpeg.encode_jpeg(
                np.ascontiguousarray(square), quality=quality, colorspace="RGB", colorsubsampling=subsampling
            )
        )
    return encoded


def merge_camera(parts: Sequence[Path], target: Path) -> dict[str, str]:
    """Join slices' MDS folders into one, renumbering the shards; returns shard file → sha256."""
    target.mkdir()
    shards: list[dict[str, Any]] = []
    checksums: dict[str, str] = {}
    for part in parts:
        for shard in json.loads((part / "index.json").read_text())["shards"]:
            raw = shard["raw_data"]
            name = f"shard.{len(shards):05}.mds"
            _link(part / raw["basename"], target / name)
            raw["basename"] = name
            checksums[name] = raw["hashes"]["sha256"]
            shards.append(shard)
    (target / "index.json").write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    return checksums


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


@contextmanager
def _progress(total: int, done: int, quiet: bool) -> Iterator[Any]:
    """Yields show(frames), which advances the progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("convert"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames · {task.fields[fps]} frames/s · ETA"),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, console=Console(file=sys.stderr), disable=quiet) as bar:
        line = bar.add_task("convert", total=total, completed=done, fps="–")

        def show(frames: int) -> None:
            bar.update(line, advance=frames)
            fps = (bar.tasks[0].completed - done) / max(1e-9, time.monotonic() - start)
            bar.update(line, fps=f"{fps:.0f}")

        yield show
