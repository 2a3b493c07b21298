"""Writing a converted source as a LeRobotDataset v3.0.

Frames become h264 videos, numbers and instructions parquet. The names of episodes, which LeRobot numbers, are kept in a
column of the episode table, and the meaning of the actions in meta/info.json, where LeRobot's reader does not look.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from data_tools.export.episodes import StoredEpisode, walk
from data_tools.export.films import CODEC, PIXELS, FilmWriter
from data_tools.export.statistics import FeatureStats, PixelCounts, of_rows, together
from data_tools.formats.lerobot_files import EPISODE_NAME
from data_tools.look.each_shard import frames_bar, store_at
from data_tools.stores.store import Advance, Store
from data_tools.stores.sync import fetch_manifest
from stamo_dist.data.schema import Manifest, dimension_names, partial_of
from stamo_dist.errors import DataError
from stamo_dist.words import counted

_CHUNK = 1000  # files in a folder
_DATA_MB, _VIDEO_MB = 100, 200  # of a file, as LeRobot's own writer has it
_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_VECTORS = {"action": "action", "original_action": "original_action", "observation.state": "proprio"}
_NUMBERS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
#: Deviation (s) of stored times from frame / rate from which on it is said that LeRobot's are the latter.
_TOLERANCE = 1e-3


@dataclass
class Exported:
    """What was written."""

    episodes: int
    frames: int
    notes: list[str] = field(default_factory=list)


@dataclass
class _Writing:
    """An export on its way: rows of the episode table, the tasks' numbers, and notes."""

    manifest: Manifest
    root: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    stats: list[dict[str, FeatureStats]] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)
    untimely: int = 0  # episodes whose times are not frame / rate

    @property
    def vectors(self) -> dict[str, tuple[str, int]]:
        """LeRobot's feature → column of the shards and its dimension."""
        m = self.manifest
        sizes = {"action": m.action_dim, "original_action": m.original_action_dim, "proprio": m.proprio_dim}
        return {feature: (column, sizes[column]) for feature, column in _VECTORS.items() if sizes[column]}


def export_lerobot(source: str, out: Path, *, quiet: bool = False) -> Exported:
    """Write all splits of a converted source into the new folder `out`, which appears when it is whole.

    Raises:
        DataError: `out` exists, the source is missing or damaged, its frames cannot be a video, or there is no room.
    """
    store = store_at(source)
    manifest, _ = fetch_manifest(store)
    if manifest.image_size % 2:
        raise DataError(
            f"{source}: frames of {manifest.image_size} px cannot be h264 video; convert it with an even --size"
        )
    try:
        with _new(out) as root:
            writing = _Writing(manifest, root)
            frames = sum(split.frames for split in manifest.splits.values())
            with frames_bar("export", frames * len(manifest.cameras), quiet) as advance:
                for n, camera in enumerate(manifest.cameras):
                    _write_camera(store, writing, camera, advance, numbers=n == 0)
            _write_meta(writing)
    except (OSError, av.FFmpegError) as e:
        raise DataError(f"{out}: cannot be written ({e.strerror or e}); make room or give another folder") from e
    notes = [] if not writing.untimely else [
        f"times: {counted(writing.untimely, 'episode')} not even; LeRobot's are frame / {manifest.rate_hz:g}"
    ]  # fmt: skip
    return Exported(len(writing.rows), frames, notes)


@contextmanager
def _new(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end; what a killed export left is removed."""
    if out.exists():
        raise DataError(f"{out}: exists; give a folder that does not")
    part, lock = partial_of(out), FileLock(out.with_name(f".{out.name}.lock"))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock.acquire(timeout=0):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                yield part
                part.rename(out)
            finally:
                shutil.rmtree(part, ignore_errors=True)
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise DataError(f"{out}: another export writes it; wait, or give another folder") from None


def _write_camera(store: Store, writing: _Writing, camera: str, advance: Advance, *, numbers: bool) -> None:
    """Encode a camera; with `numbers` also write the rows of data."""
    manifest, key = writing.manifest, f"observation.images.{camera}"

    def path(number: int) -> Path:
        return writing.root / _VIDEO.format(video_key=key, **_place(number))

    rate = Fraction(manifest.rate_hz).limit_denominator(1001)
    films, data = FilmWriter(path, manifest.image_size, rate, _VIDEO_MB * 1_000_000), _DataFiles(writing)
    try:
        for index, episode in enumerate(walk(store, manifest, camera)):
            if numbers:
                data.write(index, episode)
            pixels = PixelCounts()
            file, begins, ends = films.write(_counted(episode, manifest.image_size, pixels, advance))
            place = {f"videos/{key}/{name}": n for name, n in _place(file).items()}
            window = {f"videos/{key}/from_timestamp": begins, f"videos/{key}/to_timestamp": ends}
            writing.rows[index] |= {**place, **window}
            writing.stats[index][key] = pixels.stats()
    finally:
        films.close()
        data.close()


def _counted(episode: StoredEpisode, size: int, pixels: PixelCounts, advance: Advance) -> Iterator[NDArray[np.uint8]]:
    for frame in episode.frames(size):
        pixels.add(frame)
        yield frame
        advance(1)


class _DataFiles:
    """The parquet files with the rows; an episode is a row group of one of them."""

    def __init__(self, writing: _Writing):
        self._writing, self._file, self._bytes = writing, -1, 0
        self._writer: pq.ParquetWriter | None = None
        self._next = 0  # row of the data set

    def write(self, index: int, episode: StoredEpisode) -> None:
        """Write an episode, and begin its row of the episode table."""
        writing, length = self._writing, episode.about.length
        columns = self._columns(index, episode)
        table = pa.table({name: _as_arrow(values) for name, values in columns.items()})
        if self._writer is None or self._bytes > _DATA_MB * 1_000_000:
            self.close()
            self._file, self._bytes = self._file + 1, 0
            path = writing.root / _DATA.format(**_place(self._file))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, table.schema)
        self._writer.write_table(table)
        self._bytes += table.nbytes
        texts = {number: text for text, number in writing.tasks.items()}
        used = dict.fromkeys(columns["task_index"][:, 0].tolist())
        writing.rows.append(
            {
                "episode_index": index, "tasks": [texts[n] for n in used], "length": length,
                **{f"data/{name}": n for name, n in _place(self._file).items()},
                "dataset_from_index": self._next, "dataset_to_index": self._next + length,
                EPISODE_NAME: episode.about.id,
            }
        )  # fmt: skip
        writing.stats.append({name: of_rows(values) for name, values in columns.items()})
        self._next += length

    def close(self) -> None:
        """Finish the current file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _columns(self, index: int, episode: StoredEpisode) -> dict[str, NDArray[np.generic]]:
        """Feature → (length, D)."""
        writing, about = self._writing, episode.about
        rate, t = writing.manifest.rate_hz, np.arange(about.length)
        writing.untimely += bool(np.abs(episode.vectors("time")[:, 0].astype(np.float64) - t / rate).max() > _TOLERANCE)
        tasks = [writing.tasks.setdefault(about.instruction_at(int(n)), len(writing.tasks)) for n in t]
        numbers = {
            "timestamp": (t / rate).astype(np.float32),
            "frame_index": t,
            "episode_index": np.full(about.length, index),
            "index": self._next + t,
            "task_index": np.array(tasks),
        }
        found = {feature: episode.vectors(column) for feature, (column, _) in writing.vectors.items()}
        return {**found, **{name: values[:, None] for name, values in numbers.items()}}


def _as_arrow(values: NDArray[np.generic]) -> pa.Array:
    """(N, D) → lists of D numbers; plain numbers where D is 1, as LeRobot stores them."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _place(number: int) -> dict[str, int]:
    return {"chunk_index": number // _CHUNK, "file_index": number % _CHUNK}


def _write_meta(writing: _Writing) -> None:
    meta = writing.root / "meta"
    table = meta / "episodes" / "chunk-000" / "file-000.parquet"
    table.parent.mkdir(parents=True)
    rows = [
        {
            **row,
            **{f"stats/{name}/{kind}": value for name, one in stats.items() for kind, value in one.items()},
            **{f"meta/episodes/{name}": n for name, n in _place(0).items()},
        }
        for row, stats in zip(writing.rows, writing.stats, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), table)
    pq.write_table(_tasks(writing.tasks), meta / "tasks.parquet")
    whole = {name: together([one[name] for one in writing.stats]) for name in writing.stats[0]}
    (meta / "stats.json").write_text(json.dumps(whole, indent=4) + "\n", encoding="utf-8")
    (meta / "info.json").write_text(json.dumps(_info(writing), indent=4) + "\n", encoding="utf-8")


def _tasks(tasks: dict[str, int]) -> pa.Table:
    """The texts as the index of a table of pandas, where LeRobot looks for them."""
    names = ["task_index", "task"]
    kinds = [("int64", "int64"), ("unicode", "object")]
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, (kind, numpy) in zip(names, kinds, strict=True)
    ]
    index = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    about = {"index_columns": ["task"], "column_indexes": [index], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": pa.array(list(tasks))})
    return table.replace_schema_metadata({"pandas": json.dumps(about)})


def _info(writing: _Writing) -> dict[str, Any]:
    manifest = writing.manifest
    ends = np.cumsum([split.episodes for split in manifest.splits.values()]).tolist()
    begins = [0, *ends[:-1]]
    rate: float = int(manifest.rate_hz) if float(manifest.rate_hz).is_integer() else manifest.rate_hz
    return {
        "codebase_version": "v3.0",
        "robot_type": manifest.options.get("robot_type"),
        "total_episodes": len(writing.rows),
        "total_frames": sum(split.frames for split in manifest.splits.values()),
        "total_tasks": len(writing.tasks),
        "chunks_size": _CHUNK,
        "data_files_size_in_mb": _DATA_MB,
        "video_files_size_in_mb": _VIDEO_MB,
        "fps": rate,
        "splits": {s: f"{a}:{b}" for s, a, b in zip(manifest.splits, begins, ends, strict=True)},
        "data_path": _DATA,
        "video_path": _VIDEO,
        "features": _features(writing, rate),
        "stamo": {
            "name": manifest.name, "convention": manifest.convention, "gripper": manifest.gripper,
            "original_convention": manifest.original_convention, "source_format": manifest.source_format,
        },
    }  # fmt: skip


def _features(writing: _Writing, rate: float) -> dict[str, Any]:
    manifest, size = writing.manifest, writing.manifest.image_size
    names: Callable[[str, int], list[str]] = lambda column, n: (  # noqa: E731
        [str(d) for d in range(n)] if column == "original_action" else dimension_names(manifest, column)
    )
    video = {
        "video.height": size, "video.width": size, "video.codec": CODEC, "video.pix_fmt": PIXELS,
        "video.is_depth_map": False, "video.fps": rate, "video.channels": 3, "has_audio": False,
    }  # fmt: skip
    pictures = {"dtype": "video", "shape": [size, size, 3], "names": ["height", "width", "channels"], "info": video}
    return {
        **{
            feature: {"dtype": "float32", "shape": [n], "names": names(column, n)}
            for feature, (column, n) in writing.vectors.items()
        },
        **{f"observation.images.{camera}": pictures for camera in manifest.cameras},
        **{
            name: {"dtype": kind, "shape": [1], "names": None}
            for name, kind in {**_NUMBERS, "task_index": "int64"}.items()
        },
    }
