"""Reading the rows of a LeRobotDataset for each episode's instructions and the deviation of its timestamps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_tools.formats.lerobot_files import Listed, parquet_file, read_columns
from data_tools.formats.lerobot_tasks import TASK_INDEX, row_texts, table_texts
from data_tools.formats.lerobot_windows import THREADS, TOLERANCE
from stamo_dist.errors import DataError

#: Files whose rows the scan reads as a sample: each costs a millisecond, and a dataset may have a million.
LOOKED = 64
#: Episodes that a note lists by name.
_NAMED = 3


@dataclass(frozen=True)
class Rows:
    """One episode's rows.

    Attributes:
        texts: Distinct instructions in the order of their first rows; () without any.
        off: Largest deviation (s) of a row's timestamp from its number / fps.
        fault: Why its instructions cannot be read.
        silent: The instruction column exists but is empty.
    """

    texts: tuple[str, ...] = ()
    off: float = 0.0
    fault: str = ""
    silent: bool = False


def read_rows(listed: Sequence[Listed], column: str | None, tasks: Mapping[int, str], fps: float) -> dict[int, Rows]:
    """Rows by episode: of episodes without an instruction in the table, and of LOOKED files spread over the others.

    Each is read from the file that the table names. `column`: the rows' instruction column, None without one.
    """
    silent = {e.data for e in listed if e.data and not table_texts(e.tasks, tasks)}
    others = sorted({e.data for e in listed if e.data} - silent)
    paths = [*silent, *others[:: -(-len(others) // LOOKED) or 1]]
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(paths, pool.map(lambda path: _of_file(path, column, tasks, fps), paths), strict=True))
    return {e.index: found[e.data].get(e.index, Rows()) for e in listed if e.data in found}


def row_notes(listed: Sequence[Listed], rows: Mapping[int, Rows], tasks: Mapping[int, str], fps: float) -> list[str]:
    """Notes: instructions that differ between rows and table, and timestamps that deviate from the rate."""
    notes = []
    seen = [e for e in listed if e.index in rows]
    share = f"{len(seen)} episodes" if len(seen) == len(listed) else f"{len(seen)} of {len(listed)} episodes looked at"
    both = [(e.index, rows[e.index].texts, table_texts(e.tasks, tasks)) for e in seen]
    if other := [(index, mine, table) for index, mine, table in both if table and set(mine) - set(table)]:
        index, mine, table = other[0]
        notes.append(
            f"instructions: {len(other)} of {share} have others in their rows than in the episode table "
            f"(episode {index}: {', '.join(mine)!r:.60}; table: {', '.join(table)!r:.60}); the rows' are taken, as "
            "LeRobot does; --set instruction=none takes the table's"
        )
    if silent := [(index, table) for index, _, table in both if table and rows[index].silent]:
        index, table = silent[0]
        notes.append(
            f"instructions: {len(silent)} of {share} have a column for them with nothing in it (episode {index}); the "
            f"episode table's are taken ({', '.join(table)!r:.60})"
        )
    off = [e.index for e in seen if rows[e.index].off > TOLERANCE / fps]
    if off and any(e.videos for e in seen):
        more = ", …" if len(off) > _NAMED else ""
        notes.append(
            f"times: {len(off)} of {share} have timestamps off the {fps:g} Hz grid, by up to "
            f"{max(rows[e].off for e in off):.3g} s (episode {', '.join(map(str, off[:_NAMED]))}{more}); they are "
            "paired with the frames of their videos by order"
        )
    return notes


def has_column(path: Path, column: str) -> bool:
    """Whether a file has a column, by its footer; False if it cannot be read."""
    try:
        return column in parquet_file(path).schema_arrow.names
    except DataError:
        return False


def unsaid(path: Path, column: str, texts: Sequence[str]) -> str:
    """Why it is unknown which rows have which of the episode's instructions; "" if the column tells."""
    if has_column(path, column):
        return ""
    return f"no column {column} says which rows have which of {', '.join(texts)!r:.80}"


def _of_file(path: Path, column: str | None, tasks: Mapping[int, str], fps: float) -> dict[int, Rows]:
    try:
        there = set(parquet_file(path).schema_arrow.names)
        if column not in there or (column == TASK_INDEX and not tasks):
            column = None
        names = [n for n in dict.fromkeys(("episode_index", "frame_index", "timestamp", column)) if n in there]
        table = read_columns(path, [n for n in names if n is not None])
    except DataError:
        return {}
    if "episode_index" not in there or not len(table):
        return {}
    owner = _plain(table, "episode_index")
    within = next((_plain(table, n) for n in ("frame_index", "timestamp") if n in there), np.arange(len(table)))
    order = np.lexsort((within, owner))
    episodes, starts = np.unique(owner[order], return_index=True)
    off = np.zeros(len(table))
    if "timestamp" in there:
        number = np.arange(len(table)) - np.repeat(starts, np.diff([*starts, len(table)]))
        number = within[order] if "frame_index" in there else number
        off = np.nan_to_num(np.abs(_plain(table, "timestamp")[order] - number / fps))
    ends = [*starts[1:].tolist(), len(table)]
    found = {}
    for episode, begin, end in zip(episodes.tolist(), starts.tolist(), ends, strict=True):
        texts: tuple[str, ...] = ()
        fault = ""
        if column is not None:
            try:
                texts = _texts(table[column].take(pa.array(order[begin:end])), column, tasks)
            except DataError as e:
                fault = str(e)
        silent = column is not None and not texts and not fault
        found[int(episode)] = Rows(texts, float(off[begin:end].max()), fault, silent)
    return found


def _plain(table: pa.Table, name: str) -> np.ndarray:
    return np.nan_to_num(table[name].to_numpy().astype(np.float64))


def _texts(column: pa.ChunkedArray, name: str, tasks: Mapping[int, str]) -> tuple[str, ...]:
    if pa.types.is_integer(column.type):
        column = pa.chunked_array([column.unique()])  # in the order of their first rows
    return tuple(text for text in dict.fromkeys(row_texts(column, name, tasks)) if text)
