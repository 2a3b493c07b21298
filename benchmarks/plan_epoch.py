"""Seconds and memory that planning an epoch takes, by the number of samples and of processes.

python benchmarks/plan_epoch.py [--samples 1e6 1e7 1e8 1e9] [--ranks 1 64 4096] [--memory-limit 12]

Ours plans a stretch at a time: what counts is the time to the first batch of a run that starts in the middle of its
first epoch (as every resumed run does), the time a batch takes from then on, and the memory of one process. The peer
is streaming's own planning, which every process of a StreamingDataset runs for the whole epoch before its first batch
(here one stream, py1e). Each figure comes from a process of its own; memory is its peak beyond what the imports take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from rich.console import Console
from rich.progress import track
from rich.table import Table

PER_SHARD = 4096
BATCH = 4096
SOURCES = 8


def peak() -> float:
    """GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def ours(samples: int, ranks: int) -> dict[str, float]:
    import numpy as np

    from stamo_dist.data.allocation import Allocation
    from stamo_dist.data.lane_order import LaneOrder

    before, began = peak(), time.perf_counter()
    counts = np.full(samples // PER_SHARD, PER_SHARD, np.int64)
    first = counts.cumsum() - counts
    parts = np.array_split(np.arange(len(counts)), SOURCES)
    allocation = Allocation([{0: 1 + s} for s in range(SOURCES)], [np.inf] * SOURCES, BATCH)
    order = LaneOrder(allocation, [(first[p], counts[p]) for p in parts], BATCH, 4096, seed=0)
    slots = order.share(ranks // 2, ranks)
    middle, n = samples // BATCH // 2, order.at_a_time(len(slots))
    order.plan(middle, n, slots)
    start = time.perf_counter() - began
    began, rounds = time.perf_counter(), 64
    for i in range(1, rounds + 1):
        order.plan(middle + i * n, n, slots)
    return {"start": start, "batch": (time.perf_counter() - began) / rounds / n, "gb": peak() - before}


def streaming(samples: int, ranks: int) -> dict[str, float]:
    import stamo_dist._streaming  # noqa: F401, I001  must precede streaming
    import numpy as np
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    per_node = min(ranks, 8)
    nodes = ranks // per_node
    before, began = peak(), time.perf_counter()
    counts = np.full(samples // PER_SHARD, PER_SHARD, np.int64)
    canonical = max(64, nodes)
    ids = get_partitions("relaxed", int(counts.sum()), canonical, nodes, per_node, 1, BATCH // ranks, 0, nodes)
    shuffled = get_shuffle("py1e", counts, canonical, 0, 0, 1 << 18)
    np.where(ids != -1, shuffled[ids], -1)
    return {"start": time.perf_counter() - began, "gb": peak() - before}


def measure(kind: str, samples: int, ranks: int) -> dict[str, float] | None:
    run = subprocess.run(
        [sys.executable, __file__, "--measure", kind, str(samples), str(ranks)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, nargs="+", default=[1e6, 1e7, 1e8, 1e9])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 64, 4096])
    parser.add_argument("--memory-limit", type=float, default=12, help="GB; streaming takes about 40 bytes a sample")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, samples, ranks = options.measure
        print(json.dumps({"ours": ours, "streaming": streaming}[kind](int(samples), int(ranks))))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"planning: batch {BATCH}, {PER_SHARD} samples a shard, ours over {SOURCES} sources")
    for column in (
        "samples", "processes", "ours: first batch s", "each batch ms", "GB a process", "streaming: first batch s",
        "GB a process", "× sooner",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    cases = [(int(samples), ranks) for samples in options.samples for ranks in options.ranks]
    for samples, ranks in track(cases, "planning", console=Console(stderr=True)):
        mine = measure("ours", samples, ranks)
        assert mine is not None
        theirs = measure("streaming", samples, ranks) if samples * 40e-9 <= options.memory_limit else None
        table.add_row(
            f"{samples:.0e}", str(ranks), f"{mine['start']:.2f}", f"{mine['batch'] * 1e3:.2f}", f"{mine['gb']:.2f}",
            f"{theirs['start']:.2f}" if theirs else "over the limit", f"{theirs['gb']:.2f}" if theirs else "–",
            f"{theirs['start'] / mine['start']:.0f}" if theirs else "–",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
