"""Which files a LeRobotDataset has, and which episode is in which: layouts v2.1 and v3.0.

    v2.1  data/chunk-000/episode_000000.parquet        one file an episode
          videos/chunk-000/KEY/episode_000000.mp4
          meta/{info.json, episodes.jsonl, tasks.jsonl}
    v3.0  data/chunk-000/file-000.parquet              many episodes a file
          videos/KEY/chunk-000/file-000.mp4
          meta/{info.json, tasks.parquet, episodes/chunk-000/file-000.parquet}

Public datasets state a wrong version, have `video/` for `videos/`, or other path templates than their files: so the
files that are there decide, and info.json's templates and version are not looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stamo_dist.errors import DataError

_NUMBER = re.compile(r"episode_(\d+)\.\w+$|chunk-(\d+)/(?:.*/)?file-(\d+)\.\w+$")
_VIDEO_FOLDERS = ("videos", "video")
#: Columns of the episode table that say where things are, or are statistics.
_LOCATIONS = ("stats/", "data/", "videos/", "meta/", "dataset_from_index", "dataset_to_index")

#: (feature or "", (episode,) or (chunk, file)) → path.
Files = Mapping[tuple[str, tuple[int, ...]], Path]


@dataclass(frozen=True)
class Listed:
    """One episode as the episode table has it."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data: Path | None  # None: the file is missing
    videos: Mapping[str, tuple[Path | None, float]]  # by feature: file, and the time in it at which the episode begins
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """A dataset's files and episodes."""

    version: str  # "2.1" or "3.0", by the files
    episodes: list[Listed]
    files: list[Path]


def read_info(root: Path) -> dict[str, Any]:
    """meta/info.json, with "features" and a positive "fps".

    Raises:
        DataError: It is missing, no JSON, or lacks them.
    """
    path = root / "meta" / "info.json"
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{root}: no meta/info.json: not a LeRobotDataset") from None
    except (ValueError, OSError) as e:
        raise DataError(f"{path}: not JSON: {e}") from e
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict) or not info.get("fps", 0) > 0:
        raise DataError(f"{path}: has no features or no fps")
    return info


def find_layout(root: Path, video_features: list[str]) -> Layout:
    """List the episodes with the files of these video features.

    Raises:
        DataError: The files are of neither layout, or the tables cannot be read; all problems at once.
    """
    data = _numbered(root, ("data",))
    videos = _numbered(root, _VIDEO_FOLDERS)
    tables = sorted((root / "meta" / "episodes").rglob("*.parquet"))
    lines = root / "meta" / "episodes.jsonl"
    shared = any(len(number) == 2 for _, number in data)
    if not data or not (tables if shared else lines.is_file()):
        has = [
            name
            for name, there in (("data/", data), ("meta/episodes/", tables), (lines.name, lines.is_file()))
            if there
        ]
        raise DataError(
            f"{root}: neither LeRobot v2.1 (data/…/episode_*.parquet, meta/episodes.jsonl) nor v3.0 "
            f"(data/…/file-*.parquet, meta/episodes/…/*.parquet); of these it has {', '.join(has) or 'nothing'}"
        )
    rows = _rows_of_tables(tables) if shared else _rows_of_lines(lines)
    tasks = _tasks(root)
    locate = _locate_shared if shared else _locate_single
    episodes = []
    for where, row in rows:
        try:
            place, begins = locate(row, video_features)
            episodes.append(
                Listed(
                    index=int(row["episode_index"]),
                    length=int(row["length"]),
                    tasks=tuple(tasks.get(t, str(t)) for t in row.get("tasks") or ()),
                    data=data.get(("", place)),
                    videos={key: (videos.get((key, number)), begin) for key, (number, begin) in begins.items()},
                    meta={k: v for k, v in row.items() if _is_meta(k, v)},
                )
            )
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"{where}: the episode table lacks {e}, or it is not a number") from e
    used = {path for (key, _), path in videos.items() if key in video_features}
    meta = [
        p for p in (root / "meta").rglob("*") if p.suffix in (".json", ".jsonl", ".parquet") and "stats" not in p.name
    ]
    return Layout("3.0" if shared else "2.1", episodes, sorted({*data.values(), *used, *meta}))


def _numbered(root: Path, folders: tuple[str, ...]) -> dict[tuple[str, tuple[int, ...]], Path]:
    """Files by the feature their path names ("" for none) and their number."""
    found = {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            relative = path.relative_to(root / folder)
            match = _NUMBER.search(relative.as_posix())
            if match and path.suffix in (".parquet", ".mp4") and not path.name.startswith("."):
                feature = "/".join(part for part in relative.parts[:-1] if not part.startswith("chunk-"))
                found[feature, tuple(int(g) for g in match.groups() if g is not None)] = path
    return found


def _locate_single(row: Mapping[str, Any], features: list[str]) -> tuple[tuple[int, ...], dict[str, Any]]:
    number = (int(row["episode_index"]),)
    return number, dict.fromkeys(features, (number, 0.0))


def _locate_shared(row: Mapping[str, Any], features: list[str]) -> tuple[tuple[int, ...], dict[str, Any]]:
    def number(prefix: str) -> tuple[int, ...]:
        return int(row[f"{prefix}/chunk_index"]), int(row[f"{prefix}/file_index"])

    return number("data"), {f: (number(f"videos/{f}"), float(row[f"videos/{f}/from_timestamp"])) for f in features}


def _rows_of_tables(tables: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in tables:
        names = [name for name in parquet_file(path).schema_arrow.names if not name.startswith("stats/")]
        for number, row in enumerate(read_columns(path, names).to_pylist()):
            yield f"{path}, row {number}", row


def _rows_of_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", dict(json.loads(line))
            except (TypeError, ValueError) as e:
                raise DataError(f"{path}, line {number}: not a JSON object: {e}") from e


def _tasks(root: Path) -> dict[int, str]:
    """Task texts by task_index; in tasks.parquet the text is the table's (pandas') index."""
    parquet, lines = root / "meta" / "tasks.parquet", root / "meta" / "tasks.jsonl"
    if parquet.is_file():
        table = read_columns(parquet, None)
        texts = [c for c, kind in zip(table.column_names, table.schema.types, strict=True) if "string" in str(kind)]
        if "task_index" not in table.column_names or not texts:
            raise DataError(f"{parquet}: has no task_index or no task texts")
        return dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True))
    if lines.is_file():
        return {
            row["task_index"]: row["task"] for _, row in _rows_of_lines(lines) if {"task_index", "task"} <= set(row)
        }
    return {}


def _is_meta(key: str, value: Any) -> bool:
    known = ("episode_index", "length", "tasks")
    return key not in known and not key.startswith(_LOCATIONS) and isinstance(value, str | int | float | bool)


def parquet_file(path: Path) -> pq.ParquetFile:
    """Open a parquet file and read its footer.

    Raises:
        DataError: It is truncated or no parquet file.
    """
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path.name}: truncated or no parquet file ({e})") from e


def read_columns(path: Path, columns: list[str] | None, episode: int | None = None) -> pa.Table:
    """Columns of a parquet file, of one episode if given; row groups without it are not read.

    Raises:
        DataError: The file is corrupt or lacks a column.
    """
    try:
        only = None if episode is None else [("episode_index", "==", episode)]
        return pq.read_table(path, columns=columns, filters=only)
    except (pa.ArrowException, OSError, KeyError) as e:
        raise DataError(f"{path.name}: cannot be read ({e})") from e
