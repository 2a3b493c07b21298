"""LeRobot datasets whose numbers contradict each other: read right, or the episode is skipped by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mutated_sets import TINY
from outcomes import outcome
from tiny_sources import CAMERA, HZ, LENGTHS

DATA = "data/chunk-000/episode_000001.parquet"
TABLE = "meta/episodes/chunk-000/file-000.parquet"
N = LENGTHS[1]


def column(file: str, name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[Path], None]:
    """Puts other values into a column."""

    def edit(root: Path) -> None:
        table = pq.read_table(root / file, partitioning=None)
        at = table.column_names.index(name)
        new = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
        pq.write_table(table.set_column(at, name, new), root / file)

    return edit


def shuffle(file: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        table = pq.read_table(root / file, partitioning=None)
        pq.write_table(table.take(pa.array(np.random.default_rng(1).permutation(len(table)))), root / file)

    return edit


def entry(**changes: Any) -> Callable[[Path], None]:
    """Changes the second episode's line of v2.1's episode table."""

    def edit(root: Path) -> None:
        path = root / "meta/episodes.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[1] |= changes
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    return edit


def window(side: str, *values: float) -> Callable[[Path], None]:
    return column(TABLE, f"videos/{CAMERA}/{side}_timestamp", lambda _: list(values))


OLD, NEW = "lerobot-v21", "lerobot-v30"
FIRST, LAST = LENGTHS[0] / HZ, (LENGTHS[0] + LENGTHS[1]) / HZ


@pytest.mark.parametrize(
    ("layout", "edit", "skipped"),
    [
        pytest.param(OLD, column(DATA, "timestamp", lambda v: [t * 1.03 for t in v]), {}, id="a slow clock"),
        pytest.param(
            OLD, column(DATA, "timestamp", lambda v: [t + 0.04 * (k % 2) for k, t in enumerate(v)]), {}, id="off grid"
        ),
        pytest.param(OLD, shuffle(DATA), {}, id="shuffled rows"),
        pytest.param(NEW, shuffle("data/chunk-000/file-000.parquet"), {}, id="shuffled rows of two episodes"),
        pytest.param(
            OLD, column(DATA, "timestamp", lambda v: v[::-1]), {1: "timestamps do not increase"}, id="backwards"
        ),
        pytest.param(
            OLD, entry(length=N + 1), {1: f"{N} rows; the episode table says {N + 1}"}, id="length above rows"
        ),
        pytest.param(
            OLD, entry(length=N - 1), {1: f"{N} rows; the episode table says {N - 1}"}, id="length below rows"
        ),
        pytest.param(
            OLD, entry(episode_index=0), "episodes.jsonl, episode_index: 0 is there twice", id="an index twice"
        ),
        pytest.param(
            NEW, column(TABLE, "episode_index", lambda _: [0, 0, 2]), "episode_index: 0 is there twice", id="v3 twice"
        ),
        pytest.param(OLD, entry(episode_index=9), {9: "its data file is missing", 1: ""}, id="an index without data"),
        pytest.param(
            OLD,
            column(DATA, "episode_index", lambda v: [0] * len(v)),
            {1: "0 rows; the episode table"},
            id="rows of another",
        ),
        pytest.param(OLD, entry(tasks=[7]), {}, id="the table's task out of range, the rows' own taken"),
        pytest.param(
            OLD,
            lambda root: (entry(tasks=[])(root), column(DATA, "task_index", lambda v: [7] * len(v))(root)),
            {1: "task_index: 7 is no task_index of meta/tasks"},
            id="the rows' task out of range",
        ),
        pytest.param(
            NEW, window("from", 0.0, FIRST - 0.2, 0.0), {0: "windows overlap", 1: "its window is"}, id="overlapping"
        ),
        pytest.param(NEW, window("from", 0.0, LAST + 1, 0.0), {1: "which is no stretch of time"}, id="backward window"),
        pytest.param(NEW, window("to", FIRST, LAST + 5, 0.7), {1: f"but it has {N} rows"}, id="to behind the end"),
        pytest.param(
            NEW,
            lambda root: (window("from", 0.0, LAST, 0.0)(root), window("to", FIRST, LAST + N / HZ, 0.7)(root)),
            {1: f"but file-000.mp4 ends at {LAST:.2f} s"},
            id="behind the end",
        ),
        pytest.param(
            NEW,
            column(TABLE, f"videos/{CAMERA}/file_index", lambda _: [0, 5, 1]),
            {1: "video file of"},
            id="no such file",
        ),
    ],
)
def test_contradictions(
    layout: str, edit: Callable[[Path], Any], skipped: dict[int, str] | str, tmp_path: Path
) -> None:
    tiny, root = TINY[layout], tmp_path / "set"
    root.mkdir()
    tiny.make(root)
    whole = outcome(tiny, root, tmp_path / "before")
    edit(root)
    now = outcome(tiny, root, tmp_path / "out")
    if isinstance(skipped, str):
        assert skipped in str(now.error)
        return
    assert now.error is None, now.error
    for index, reason in skipped.items():
        assert re.search(rf"episode_{index:06d}\b.*{re.escape(reason)}", now.said), now.said
    for index in set(range(3)) - set(skipped):
        id = f"episode_{index:06d}"
        for name, values in whole.episodes[id].items():
            if name != "time":
                assert now.episodes[id][name] == values, (id, name)
