"""What a sample costs by what is read (frame, pair, chunk), by the number of workers, of sources and of shards.

python benchmarks/loader_scale.py [--frames 4000] [--turns 3]

Rates are decoded images per second (a pair has two), beside decoding the same JPEGs from memory right before, in as
many processes at a time as there are workers. A turn is a pass over the data, the first one
is not counted; × is the median share of that limit over the turns.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from frames import libero_frames, write_mds
from loader import RAMP, Server, decode_turns, together
from rich.console import Console
from rich.progress import track
from rich.table import Table

SIZE, BATCH = 224, 32
READ = {
    "frame t": {},
    "frames t and t+8, actions between": {"horizon": 8},
    "frame t, 8 actions": {"horizon": 8, "target": False},
}


def batches(folders: list[str], workers: int, options: dict[str, Any]) -> tuple[Iterator[Any], int]:
    """The loader, and how many batches one pass over its data has."""
    from stamo_dist.data.loader import Cursor, build_loader
    from stamo_dist.data.mixture import Mixture
    from stamo_dist.recipe.data import Data, SourceConfig

    sources = {f"s{i}": SourceConfig(path=folder, weight=1 + i % 3) for i, folder in enumerate(folders)}
    data = Data(sources=sources, image_size=SIZE, prefetch=2, **options)
    mixture = Mixture(data, seed=0, global_batch=BATCH)
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=workers)
    return iter(loader), mixture.num_samples // BATCH


def reading_turns(connection: Connection, folders: list[str], options: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    loaders: dict[int, tuple[Iterator[Any], int]] = {}
    images = 2 if options.get("horizon") and options.get("target", True) else 1
    connection.send("ready")
    while (workers := connection.recv()) is not None:
        if workers not in loaders:
            loaders[workers] = batches(folders, workers, options)
            gc.freeze()  # as `stamo train` does once it has begun
        loader, count = loaders[workers]
        for _ in islice(loader, RAMP):
            pass
        del _  # a batch that is held keeps its slot from being used again
        began = time.perf_counter()
        n = sum(len(batch) for batch in islice(loader, count)) * images
        rate = n / (time.perf_counter() - began)
        connection.send((rate, rate))


def row(table: Table, name: str, rates: list[float], limits: list[float]) -> None:
    ratio = statistics.median(rate / limit for rate, limit in zip(rates, limits, strict=True))
    table.add_row(name, f"{statistics.median(rates):,.0f}", f"{statistics.median(limits):,.0f}", f"×{ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 100, 1000, 10000])
    shared = Path(os.environ.get("STAMO_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--hdf5", type=Path, default=shared / "libero_spatial_task2_128.hdf5")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="stamo-benchmark-"))
    try:
        measure(options, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def measure(options: argparse.Namespace, root: Path) -> None:
    errors = Console(stderr=True)
    jpegs = list(libero_frames(options.hdf5, options.frames, SIZE))
    spread = (jpegs * -(-2 * max(options.shards) // len(jpegs)))[: 2 * max(options.shards)]
    for shards in track(options.shards, "writing shards", console=errors):
        write_mds(root / f"shards-{shards}", spread, SIZE, shards)
    for i in track(range(max(options.sources)), "writing sources", console=errors):
        write_mds(root / f"source-{i}", jpegs[i :: max(options.sources)], SIZE, 2)
    write_mds(root / "one", jpegs, SIZE)
    one = [str(root / "one")]
    every = [str(root / f"source-{i}") for i in range(max(options.sources))]
    cases: list[tuple[str, str, int, list[str], dict[str, Any]]] = [
        ("what", f"{what}, {workers} workers", workers, one, fields)
        for what, fields in READ.items()
        for workers in options.workers
    ]
    cases += [("sources", f"{n} sources", 0, every[:n], {}) for n in options.sources]
    cases += [("shards", f"{n:,} shards", 0, [str(root / f"shards-{n}")], {}) for n in options.shards]
    tables = {"what": "by what is read", "sources": "by the number of sources", "shards": "by the number of shards"}
    console = Console(width=None if sys.stdout.isatty() else 110)
    found = {key: Table(title=f"{title}: images per second, {SIZE} px, shuffled") for key, title in tables.items()}
    for table in found.values():
        for column in ("", "loader", "decoding alone", "share"):
            table.add_column(column, justify="right" if column else "left")
    with ExitStack() as stack:
        decoders = [stack.enter_context(Server(decode_turns, jpegs, SIZE)) for _ in range(max(1, *options.workers))]
        for key, name, workers, folders, fields in track(cases, "measuring", console=errors):
            limits, rates = [], []
            with Server(reading_turns, folders, fields) as server:
                for turn in range(options.turns + 1):
                    limit, rate = together(decoders[: max(1, workers)]), together([server], workers)
                    if turn:  # the first one warms
                        limits.append(limit.wall)
                        rates.append(rate.wall)
            row(found[key], name, rates, limits)
    for table in found.values():
        console.print(table)


if __name__ == "__main__":
    main()
