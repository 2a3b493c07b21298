"""The files of a LeRobotDataset and the episodes in them: layouts v2.1 and v3.0.

    v2.1  data/chunk-000/episode_000000.parquet        one file an episode
          videos/chunk-000/KEY/episode_000000.mp4
          meta/{info.json, episodes.jsonl, tasks.jsonl}
    v3.0  data/chunk-000/file-000.parquet              many episodes a file
          videos/KEY/chunk-000/file-000.mp4
          meta/{info.json, tasks.parquet, episodes/chunk-000/file-000.parquet}

Public datasets state a wrong version, have `video/` for `videos/`, or path templates that do not match their files:
so the layout is found from the existing files; info.json's templates and version are ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.formats.checked import a_text, read_lines, seconds, whole
from data_tools.formats.source import check_lfs, check_there, walk
from stamo_dist.errors import DataError

_NUMBER = re.compile(r"episode_(\d+)\.\w+$|chunk-(\d+)/(?:.*/)?file-(\d+)\.\w+$")
_VIDEO_FOLDERS = ("videos", "video")
#: The column of the episode table in which `stamo data export` keeps the names of episodes.
EPISODE_NAME = "stamo/episode"
#: The column of meta/tasks.parquet with the texts; pandas' index comes first.
TASK_TEXTS = ("task", "__index_level_0__")
#: Columns with one number a row.
SCALARS = ("episode_index", "frame_index", "timestamp", "task_index", "index")
#: Columns in which numbers may be missing: then the episode table is used.
_MAY_LACK = ("task_index", "index")
_SHOWN = 5
#: Columns of the episode table with file positions or statistics.
_LOCATIONS = ("stats/", "data/", "videos/", "meta/", "dataset_from_index", "dataset_to_index")

#: (feature or "", (episode,) or (chunk, file)) → path.
Files = Mapping[tuple[str, tuple[int, ...]], Path]


@dataclass(frozen=True)
class VideoWindow:
    """Position of an episode in a video file: from `begins` up to `ends` (s); None: the file's end."""

    path: Path
    begins: float = 0.0
    ends: float | None = None


@dataclass(frozen=True)
class Listed:
    """One row of the episode table."""

    index: int
    name: str  # the one that it had before `stamo data export`, else by its number
    length: int
    tasks: tuple[str | int, ...]  # texts, or numbers of tasks
    data: Path | None  # None: the file is missing
    videos: Mapping[str, VideoWindow]  # by feature
    meta: Mapping[str, Any]
    fault: str = ""  # why it cannot be used; "" if it can


@dataclass(frozen=True)
class LeRobotLayout:
    """A dataset's files and episodes."""

    version: str  # "2.1" or "3.0", judged by the files
    episodes: list[Listed]
    tasks: Mapping[int, str]  # text by task_index
    files: list[Path]
    notes: list[str]


def find_layout(root: Path, video_features: list[str]) -> LeRobotLayout:
    """List the episodes with the files of these video features.

    Raises:
        DataError: The files have neither layout, or the tables cannot be read; all problems at once.
    """
    data = _numbered(root, ("data",))
    videos = _numbered(root, _VIDEO_FOLDERS)
    tables = [p for p in walk(root / "meta" / "episodes") if p.suffix == ".parquet"]
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
    rows = _rows_of_tables(tables) if shared else read_lines(lines)
    episodes = [_listed(where, row, data, videos, video_features, shared) for where, row in rows]
    if not episodes:
        raise DataError(f"{tables[0] if shared else lines}: lists no episode")
    if twice := [index for index, n in Counter(e.index for e in episodes).items() if n > 1]:
        raise DataError(f"{tables[0] if shared else lines}, episode_index: {twice[0]} is there twice")
    episodes, notes = _numbered_if_alike(episodes)
    used = {path for (key, _), path in videos.items() if key in video_features}
    meta = [p for p in walk(root / "meta") if p.suffix in (".json", ".jsonl", ".parquet") and "stats" not in p.name]
    for path in meta:
        check_there(path)
    files = sorted(path for path in {*data.values(), *used, *meta} if path.exists())
    notes += _unlisted(data, episodes)
    return LeRobotLayout("3.0" if shared else "2.1", episodes, read_tasks(root), files, notes)


def _numbered_if_alike(episodes: list[Listed]) -> tuple[list[Listed], list[str]]:
    """Episodes by their numbers if two have one name, as after sets were put together; and a note on it."""
    names = Counter(e.name for e in episodes)
    if len(names) == len(episodes):
        return episodes, []
    note = f"episodes are named by number: {EPISODE_NAME} has {names.most_common(1)[0][0]} twice"
    return [replace(e, name=f"episode_{e.index:06d}") for e in episodes], [note]


def _unlisted(data: Files, episodes: list[Listed]) -> list[str]:
    """A note on episodes that have data but no entry in the episode table."""
    listed = {e.index for e in episodes}
    lost: set[int] = set()
    for (_, number), path in data.items():
        if len(number) == 1:
            lost.update(set(number) - listed)
            continue
        with suppress(DataError):  # a damaged file is reported with its episodes, if it has any
            if not _between(path) <= listed:
                there = read_columns(path, ["episode_index"])["episode_index"].unique().to_pylist()
                lost.update({int(index) for index in there} - listed)
    if not lost:
        return []
    named = ", ".join(f"episode_{index:06d}" for index in sorted(lost)[:_SHOWN])
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    return [f"left out: data of episodes that the episode table does not list: {named}{more}"]


def _between(path: Path) -> set[int]:
    """The episodes that a data file may contain, by the bounds in its footer; {-1} if the footer has none."""
    footer = parquet_file(path).metadata
    found: set[int] = set()
    for group in (footer.row_group(k) for k in range(footer.num_row_groups)):
        for column in (group.column(c) for c in range(group.num_columns)):
            if column.path_in_schema == "episode_index":
                about = column.statistics
                if about is None or not about.has_min_max or not isinstance(about.min, int):
                    return {-1}
                if about.max - about.min > group.num_rows:
                    return {-1}
                found.update(range(about.min, about.max + 1))
    return found


def _numbered(root: Path, folders: tuple[str, ...]) -> dict[tuple[str, tuple[int, ...]], Path]:
    """Files by the feature in their path ("" without one) and their number."""
    found = {}
    for folder in folders:
        for path in walk(root / folder):
            relative = path.relative_to(root / folder)
            match = _NUMBER.search(relative.as_posix())
            if match and path.suffix in (".parquet", ".mp4"):
                feature = "/".join(part for part in relative.parts[:-1] if not part.startswith("chunk-"))
                found[feature, tuple(int(g) for g in match.groups() if g is not None)] = path
    return found


def _listed(
    where: str, row: Mapping[str, Any], data: Files, videos: Files, features: list[str], shared: bool
) -> Listed:
    """One row of the episode table; a missing file position makes only this episode unusable.

    Raises:
        DataError: The row lacks the episode's index or length.
    """
    index, length = (whole(row.get(key), f"{where}, {key}") for key in ("episode_index", "length"))
    path, windows, faults = None, {}, []
    try:
        path = data.get(("", _place(row, "data", where) if shared else (index,)))
    except DataError as e:
        faults.append(str(e))
    else:
        faults += [] if path else ["its data file is missing"]
    for feature in features:
        key = f"videos/{feature}"
        try:
            video = videos.get((feature, _place(row, key, where) if shared else (index,)))
            if video is None:
                faults.append(f"its video file of {feature} is missing")
            elif shared:
                ends = row.get(f"{key}/to_timestamp")
                windows[feature] = VideoWindow(
                    video,
                    seconds(row.get(f"{key}/from_timestamp"), f"{where}, {key}/from_timestamp"),
                    None if ends is None else seconds(ends, f"{where}, {key}/to_timestamp"),
                )
            else:
                windows[feature] = VideoWindow(video)
        except DataError as e:
            faults.append(str(e))
    meta = {k: v for k, v in row.items() if _is_meta(k, v)}
    tasks = _task_list(row.get("tasks"), f"{where}, tasks")
    name = str(row.get(EPISODE_NAME) or f"episode_{index:06d}")
    return Listed(index, name, length, tasks, path, windows, meta, "; ".join(faults))


def _place(row: Mapping[str, Any], prefix: str, where: str) -> tuple[int, int]:
    chunk, file = (whole(row.get(key), f"{where}, {key}") for key in (f"{prefix}/chunk_index", f"{prefix}/file_index"))
    return chunk, file


def _task_list(tasks: Any, where: str) -> tuple[str | int, ...]:
    """A text, a number, or a list of them."""
    parts = tasks if isinstance(tasks, list) else [] if tasks is None else [tasks]
    if wrong := [part for part in parts if isinstance(part, bool) or not isinstance(part, str | int)]:
        raise DataError(f"{where}: must be a text or a list of texts, not {wrong[0]!r}")
    return tuple(parts)


def _rows_of_tables(tables: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in tables:
        names = [name for name in parquet_file(path).schema_arrow.names if not name.startswith("stats/")]
        for number, row in enumerate(read_columns(path, names).to_pylist()):
            yield f"{path}, row {number}", row


def read_tasks(root: Path) -> dict[int, str]:
    """Task texts by task_index; in tasks.parquet the text is the table's (pandas') index.

    Raises:
        DataError: The table cannot be read.
    """
    parquet, lines = root / "meta" / "tasks.parquet", root / "meta" / "tasks.jsonl"
    if parquet.is_file():
        table = read_columns(parquet, None)
        texts = [name for name in table.column_names if _is_text(table.schema.field(name).type)]
        if "task_index" not in table.column_names or not texts:
            has = ", ".join(f"{field.name} ({field.type})" for field in table.schema) or "nothing"
            raise DataError(f"{parquet}: has no task_index or no task texts; it has {has}")
        said = next((name for name in TASK_TEXTS if name in texts), texts[0])
        rows = [
            {"task_index": n, "task": t}
            for n, t in zip(*(table[c].to_pylist() for c in ("task_index", said)), strict=True)
        ]
        numbered = [(f"{parquet}, row {k}", row) for k, row in enumerate(rows)]
    else:
        said, numbered = "task", list(read_lines(lines)) if lines.is_file() else []
    found: dict[int, str] = {}
    for where, row in numbered:
        number, text = whole(row.get("task_index"), f"{where}, task_index"), a_text(row.get("task"), f"{where}, {said}")
        if found.setdefault(number, text) != text:
            raise DataError(f"{where}, task_index: {number} is there twice, with different texts")
    return found


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_meta(key: str, value: Any) -> bool:
    known = ("episode_index", "length", "tasks", EPISODE_NAME)
    return key not in known and not key.startswith(_LOCATIONS) and isinstance(value, str | int | float | bool)


def parquet_file(path: Path) -> pq.ParquetFile:
    """Open a parquet file and read its footer.

    Raises:
        DataError: It is truncated or no parquet file.
    """
    check_lfs(path)
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path.name}: truncated or no parquet file ({e})") from e
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise DataError(f"{path.name}: has two columns {twice[0]}")
    return file


def read_columns(path: Path, columns: list[str] | None, episode: int | None = None) -> pa.Table:
    """Columns of a parquet file, of one episode if given; row groups without it are not read.

    `episode_index`, `frame_index`, `timestamp` and `task_index` are numbers even where they are stored as [number].

    Raises:
        DataError: The file is corrupt or lacks a column.
    """
    file = parquet_file(path)
    schema = file.schema_arrow
    if lacking := [name for name in columns or () if name not in schema.names]:
        raise DataError(f"{path.name}: has no column {', '.join(lacking)}")
    plain = episode is not None and pa.types.is_integer(schema.field("episode_index").type)
    try:
        if plain:
            # Through a file object, so that folder names such as KEY=VALUE do not become partition columns.
            with path.open("rb") as source:
                table = pq.read_table(source, columns=columns, filters=[("episode_index", "==", episode)])
        else:
            table = file.read(columns)  # without pyarrow.dataset, which is slow for layouts with one file per episode
        for number, name in enumerate(table.column_names):
            if name in SCALARS and pa.types.is_nested(table.schema.field(name).type):
                if (flat := _flat(table[name].combine_chunks())) is None:
                    raise DataError(f"{path.name}, {name}: must be one number a row")
                table = table.set_column(number, name, flat)
            if name in SCALARS:
                _check_numbers(table[name], name, path)
        if episode is not None and not plain:
            table = table.filter(pc.equal(table["episode_index"], episode))
        return table
    except (pa.ArrowException, OSError, KeyError) as e:
        raise DataError(f"{path.name}: cannot be read ({e})") from e


def _check_numbers(column: pa.ChunkedArray, name: str, path: Path) -> None:
    """Raises:
    DataError: The column is not numeric, a required number is missing, or one is not finite.
    """
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        if not (pa.types.is_null(column.type) and name in _MAY_LACK):
            raise DataError(f"{path.name}, {name}: must be numbers, not {column.type}")
        return
    fine = pc.is_finite(column).fill_null(name in _MAY_LACK).to_pylist()
    if not all(fine):
        row = fine.index(False)
        raise DataError(f"{path.name}, {name}: row {row} has no number ({column[row].as_py()})")


def median_step(path: Path, episode: int) -> float | None:
    """Median seconds between rows of an episode, by its timestamps; None if they are unknown."""
    if "timestamp" not in parquet_file(path).schema_arrow.names:
        return None
    stamps = read_columns(path, ["episode_index", "timestamp"], episode)["timestamp"].to_numpy()
    step = float(np.median(np.diff(np.sort(stamps)))) if len(stamps) > 1 else 0.0
    return step if step > 0 else None


def _flat(values: pa.Array) -> pa.Array | None:
    """Lists of one number each as numbers."""
    if (
        pa.types.is_struct(values.type)
        or pa.types.is_map(values.type)
        or not pc.all(pc.equal(pc.list_value_length(values), 1).fill_null(False)).as_py()
    ):
        return None
    return values.flatten()
