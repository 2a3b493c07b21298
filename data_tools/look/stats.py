"""`stamo data stats`: statistics of a source's actions and proprioception, for normalisation.

The vectors are the same in every camera, so the first one's shards are read, once, without touching an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.look.columns import ColumnShard, IndexedShard
from data_tools.look.each_shard import agreed_shards, frames_bar, in_order, processes_for, store_at
from data_tools.look.sketch import Moments, Quantiles
from data_tools.stores.store import at_hand
from data_tools.stores.sync import fetch_manifest, put_bytes
from stamo_dist.data.schema import MANIFEST, Manifest, Stats, dimension_names, scaling_notes
from stamo_dist.errors import DataError

#: The training split, whose statistics are stored in the manifest.
TRAIN = "train"
#: Rows processed per call.
ROWS = 1 << 16

Sums = tuple[Moments, Quantiles]


def source_stats(
    source: str | Path, split: str = TRAIN, *, processes: int | None = None, quiet: bool = True
) -> dict[str, Stats]:
    """Statistics of "action" and "proprio", whichever the source has, over all frames of a split.

    mean, std (of the population), min and max are those of float64; q01 and q99 are off by at most 0.05 % of the order
    statistics they lie between (data_tools/look/sketch.py). The result does not depend on `processes`.

    Args:
        source: Folder or URL.
        split: Which split.
        processes: One a core on large sources when omitted.
        quiet: No progress bar.

    Raises:
        DataError: The source or split is missing or damaged, or has NaN or infinite values.
    """
    store = store_at(str(source))
    manifest, _ = fetch_manifest(store)
    if split not in manifest.splits:
        raise DataError(f"{source}: has no split {split!r}, only {', '.join(manifest.splits) or 'none'}")
    dims = {"action": manifest.action_dim, "proprio": manifest.proprio_dim}
    columns = tuple(name for name, dim in dims.items() if dim)
    if not columns:
        return {}
    shards = agreed_shards(store, manifest, split, manifest.cameras[0])
    tasks = [_Task(str(source), f"{split}/{manifest.cameras[0]}", shard, columns) for shard in shards if shard.samples]
    sums: dict[str, Sums] = {}
    with frames_bar("stats", sum(task.shard.samples for task in tasks), quiet) as advance:
        results = in_order(_sums, tasks, processes_for(sum(task.shard.nbytes for task in tasks), processes))
        for task, found in zip(tasks, results, strict=True):
            sums = {name: merge(sums.get(name), found[name]) for name in columns}
            advance(task.shard.samples)
    frames = manifest.splits[split].frames
    if not sums or sums[columns[0]][0].count != frames:
        count = sums[columns[0]][0].count if sums else 0
        raise DataError(
            f"{source}: split {split} has {count} frames, the manifest says {frames}; `stamo data check` it"
        )
    return {name: to_stats(sums[name], manifest.gripper if name == "action" else None) for name in columns}


def keep_stats(source: str | Path, stats: Mapping[str, Stats]) -> None:
    """Write statistics of split train into the manifest; nothing else in it changes.

    Raises:
        DataError: It cannot be written.
    """
    store = store_at(str(source))
    manifest, text = fetch_manifest(store)
    changed = manifest.model_copy(update={"stats": dict(stats)}).model_dump_json(indent=2).encode() + b"\n"
    if changed != text:
        put_bytes(store, MANIFEST, changed)


@dataclass(frozen=True)
class _Task:
    source: str
    folder: str
    shard: IndexedShard
    columns: tuple[str, ...]


def _sums(task: _Task) -> dict[str, Sums]:
    store = store_at(task.source)
    with at_hand(store, f"{task.folder}/{task.shard.name}") as path:
        shard = ColumnShard(task.shard.spec(path))
        return {name: _sums_of(shard.vectors(name), f"{task.folder}/{task.shard.name}", name) for name in task.columns}


def _sums_of(vectors: np.ndarray, where: str, column: str) -> Sums:
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise DataError(f"{where}: sample {bad[0]}: {column} is not finite; `stamo data check` lists all such frames")
    result: Sums | None = None
    for start in range(0, len(vectors), ROWS):
        result = merge(result, sums_of(vectors[start : start + ROWS]))
    assert result is not None
    return result


def sums_of(vectors: np.ndarray) -> Sums:
    """Sums of (N, D) finite float32 vectors, N > 0."""
    return Moments.of(vectors), Quantiles.of(vectors)


def merge(a: Sums | None, b: Sums) -> Sums:
    """Sums of the union."""
    return b if a is None else (a[0].merge(b[0]), a[1].merge(b[1]))


def to_stats(sums: Sums, gripper: int | None) -> Stats:
    """The statistics in the manifest's form; `gripper` is the dimension that is not normalised."""
    moments, quantiles = sums
    q01, q99 = quantiles.at((0.01, 0.99), moments)
    return Stats(
        mean=moments.mean.tolist(),
        std=moments.std.tolist(),
        min=moments.low.tolist(),
        max=moments.high.tolist(),
        q01=q01.tolist(),
        q99=q99.tolist(),
        mask=[d != gripper for d in range(len(moments.mean))],
        count=moments.count,
    )


def print_stats(manifest: Manifest, split: str, stats: Mapping[str, Stats]) -> None:
    """Print one table per vector, with one row per dimension."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from stamo_dist.tables import Whole, show

    console = Console(highlight=False)
    for column, found in stats.items():
        title = f"{manifest.name} · {column} · split {split} · {found.count} frames"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in ("", "mean", "std", "min", "q01", "q99", "max", "mask"):
            table.add_column(head, justify="left" if head in ("", "mask") else "right", no_wrap=True)
        rows: Any = zip(found.mean, found.std, found.min, found.q01, found.q99, found.max, strict=True)
        for name, numbers, mask in zip(dimension_names(manifest, column), rows, found.mask, strict=True):
            table.add_row(name, *(f"{x + 0.0:.3g}" for x in numbers), "yes" if mask else "no")
        show(console, Whole(table))
        for note in scaling_notes(manifest, column, found):
            console.print(f"  {note}", soft_wrap=True)
