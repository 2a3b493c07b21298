"""Samples/s of the loader against other formats and against pure JPEG decoding, on the same frames in one run.

python benchmarks/loader.py [--frames 4000] [--size 224] [--data SOURCE/SPLIT/CAMERA] [--hdf5 LIBERO.hdf5]

Every loader yields shuffled uint8 (batch, H, W, 3) batches decoded by the same simplejpeg call. The limit is that
call alone, on JPEGs in memory into one buffer, in as many processes at a time as there are workers. All are warm and
take turns; a ratio is the median over the turns of a loader's rate to the limit measured right before it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import psutil
import simplejpeg
from frames import (
    SHARDS,
    decode,
    libero_frames,
    shard_frames,
    write_hdf5,
    write_litdata,
    write_mds,
    write_webdataset,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

# Each loader is measured in a process of its own, which imports what that loader needs.

PREFETCH = 2
RAMP = 10  # batches before the clock starts, so that all are measured with full queues

Run = Callable[[], Iterator[Any]]
Make = Callable[[int], Run]  # for a number of workers


# One epoch of each; what they share between numbers of workers is made once -------------------------------------------


def ours(root: Path, batch: int, size: int) -> Make:
    from stamo_dist.data.loader import Cursor, build_loader
    from stamo_dist.data.mixture import Mixture
    from stamo_dist.recipe.data import Data, SourceConfig

    data = Data(sources={"s": SourceConfig(path=str(root))}, image_size=size, prefetch=PREFETCH)
    mixture = Mixture(data, seed=0, global_batch=batch)

    def make(workers: int) -> Run:
        loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=workers)
        return lambda: (b.images for b in islice(loader, mixture.num_samples // batch))

    return make


def stock(root: Path, batch: int, size: int) -> Make:
    import stamo_dist._torchvision  # noqa: F401, I001  must precede streaming
    from streaming import StreamingDataLoader, StreamingDataset

    class Decoded(StreamingDataset):
        def get_item(self, sample_id: int, retry: int = 7) -> np.ndarray:
            return decode(super().get_item(sample_id, retry)["image"])

    def make(workers: int) -> Run:
        # A folder of its own for each: two data sets on one folder get in each other's way.
        folder = root.with_name(f"stock-{workers}")
        folder.symlink_to(root / "train" / "front")
        dataset = Decoded(local=str(folder), batch_size=batch, shuffle=True, num_canonical_nodes=64)
        loader = StreamingDataLoader(dataset, batch_size=batch, drop_last=True, **_options(workers))
        return lambda: iter(loader)

    return make


def _options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        **({"prefetch_factor": PREFETCH, "multiprocessing_context": "fork"} if workers else {}),
    }


def web(root: Path, batch: int, size: int) -> Make:
    import webdataset
    from torch.utils.data import DataLoader

    urls = sorted(map(str, root.glob("*.tar")))

    def make(workers: int) -> Run:
        dataset = webdataset.WebDataset(urls, shardshuffle=SHARDS).shuffle(1000).map(lambda row: decode(row["jpg"]))
        loader = DataLoader(dataset, batch_size=batch, drop_last=True, **_options(workers))
        return lambda: iter(loader)

    return make


def lit(root: Path, batch: int, size: int) -> Make:
    import stamo_dist._torchvision  # noqa: F401, I001  litdata imports torchvision
    import litdata

    class Decoded(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> np.ndarray:
            return decode(super().__getitem__(index)["image"])

    def make(workers: int) -> Run:
        dataset = Decoded(str(root), shuffle=True, drop_last=True)
        loader = litdata.StreamingDataLoader(dataset, batch_size=batch, drop_last=True, **_options(workers))
        return lambda: iter(loader)

    return make


def hdf5(path: Path, batch: int, size: int) -> Make:
    from torch.utils.data import DataLoader, Dataset

    class Decoded(Dataset[np.ndarray]):
        column: h5py.Dataset | None = None

        def __len__(self) -> int:
            with h5py.File(path) as file:
                return len(file["jpeg"])

        def __getitem__(self, i: int) -> np.ndarray:
            if self.column is None:  # opened in the worker
                self.column = h5py.File(path)["jpeg"]
            return decode(self.column[i])

    def make(workers: int) -> Run:
        loader = DataLoader(Decoded(), batch_size=batch, shuffle=True, drop_last=True, **_options(workers))
        return lambda: iter(loader)

    return make


# Measuring -----------------------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    wall: float  # samples/s
    cpu: float  # samples per second of CPU time


def decode_turns(connection: Connection, jpegs: list[bytes], size: int) -> None:
    """Whenever asked: decode all frames in random order into one buffer."""
    # Aligned to 16 bytes only, like the slots of the loader: the decoder is slower on output that is aligned to 32.
    memory = np.empty(size * size * 3 + 32, np.uint8)
    shift = (16 - memory.ctypes.data) % 32
    buffer = memory[shift : shift + size * size * 3].reshape(size, size, 3)
    rng = np.random.default_rng(os.getpid())
    connection.send("ready")
    while connection.recv() is not None:
        order = rng.permutation(len(jpegs))
        began, used = time.perf_counter(), time.process_time()
        for i in order:
            decode(jpegs[i], buffer)
        connection.send((len(jpegs) / (time.perf_counter() - began), len(jpegs) / (time.process_time() - used)))


def loader_turns(
    connection: Connection, prepare: Callable[[Path, int, int], Make], path: Path, batch: int, size: int
) -> None:
    """Whenever a number of workers is asked for: one epoch with them."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    make = prepare(path, batch, size)
    runs: dict[int, Run] = {}
    connection.send("ready")
    while (workers := connection.recv()) is not None:
        if workers not in runs:
            runs[workers] = make(workers)
        batches = runs[workers]()
        for images in islice(batches, RAMP):
            assert images.shape == (batch, size, size, 3), images.shape
            assert images.dtype == torch.uint8
            del images  # a batch that is held keeps its slot from being used again
        began, used = time.perf_counter(), cpu_seconds()
        n = sum(len(images) for images in batches)
        connection.send((n / (time.perf_counter() - began), n / (cpu_seconds() - used)))


def cpu_seconds() -> float:
    """CPU time so far of this process and all that it started, those that have ended included."""
    total = 0.0
    for process in [this := psutil.Process(), *this.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _serve(target: Callable[..., None], connection: Connection, *arguments: Any) -> None:
    with suppress(EOFError):  # the benchmark was stopped
        target(connection, *arguments)


class Server:
    """A process that measures one thing whenever it is asked, so that nothing else runs in it."""

    def __init__(self, target: Callable[..., None], *arguments: Any):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(target, theirs, *arguments))
        self.process.start()
        theirs.close()
        self.connection.recv()

    def start(self, workers: int) -> None:
        self.connection.send(workers)

    def figures(self) -> Figures:
        return Figures(*self.connection.recv())

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.connection.send(None)
        self.process.join(timeout=20)
        self.process.kill()  # some loaders leave threads running


def together(servers: list[Server], workers: int = 0) -> Figures:
    for server in servers:
        server.start(workers)
    figures = [server.figures() for server in servers]
    return Figures(sum(f.wall for f in figures), statistics.mean(f.cpu for f in figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--size", type=int, default=224, help="side of the frames made from --hdf5")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="SOURCE/SPLIT/CAMERA of real shards to take the frames from")
    shared = Path(os.environ.get("STAMO_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--hdf5", type=Path, default=shared / "libero_spatial_task2_128.hdf5")
    parser.add_argument("--only", nargs="+", help="names of the loaders to measure")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    root = Path(tempfile.mkdtemp(prefix="stamo-benchmark-"))
    # streaming leaves lock files in the temporary folder.
    tempfile.tempdir = os.environ["TMPDIR"] = str(root)
    try:
        measure(options, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def measure(options: argparse.Namespace, root: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.data:
        jpegs = list(shard_frames(options.data, options.frames))
    else:
        jpegs = list(track(libero_frames(options.hdf5, options.frames, options.size), "frames", options.frames))
    height, width = simplejpeg.decode_jpeg_header(jpegs[0])[:2]
    write_mds(root / "mds", jpegs, height)
    write_webdataset(root / "tar", jpegs)
    write_litdata(root / "lit", jpegs)
    write_hdf5(root / "raw.hdf5", jpegs)
    kinds: dict[str, tuple[Callable[[Path, int, int], Make], Path]] = {
        "stamo-dist (MDS)": (ours, root / "mds"),
        "StreamingDataset (MDS)": (stock, root / "mds"),
        "WebDataset (tar)": (web, root / "tar"),
        "LitData": (lit, root / "lit"),
        "raw HDF5": (hdf5, root / "raw.hdf5"),
    }
    kinds = {name: kind for name, kind in kinds.items() if not options.only or name.split()[0] in options.only}
    with ExitStack() as stack:
        decoders = [stack.enter_context(Server(decode_turns, jpegs, height)) for _ in range(max(1, *options.workers))]
        loaders = {
            name: stack.enter_context(Server(loader_turns, prepare, path, options.batch, height))
            for name, (prepare, path) in kinds.items()
        }
        turns = [(name, workers) for workers in options.workers for name in kinds]
        rates: dict[tuple[str, int], list[Figures]] = {key: [] for key in turns}
        limits: dict[tuple[str, int], list[Figures]] = {key: [] for key in turns}
        for turn in track(range(options.repeats + 1), "turns"):
            for name, workers in turns:
                bound = together(decoders[: max(1, workers)])
                measured = together([loaders[name]], workers)
                if turn:  # the first turn warms the page cache
                    limits[name, workers].append(bound)
                    rates[name, workers].append(measured)

    _print(console, list(kinds), options, rates, limits)
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    console.print(
        f"{len(jpegs)} frames of {width} × {height} px, {sum(map(len, jpegs)) / len(jpegs) / 1000:.1f} kB; batch "
        f"{options.batch}; {os.cpu_count()} CPUs, load over the last 1, 5, 15 minutes {loads}"
    )


def _print(
    console: Console, names: list[str], options: argparse.Namespace, rates: dict[tuple[str, int], list[Figures]],
    limits: dict[tuple[str, int], list[Figures]],
) -> None:  # fmt: skip
    table = Table(title=f"shuffled, decoded samples; medians of {options.repeats} turns; × = share of decoding alone")
    table.add_column("loader")
    for workers in options.workers:
        table.add_column(f"{workers} workers:\nper second", justify="right")
        table.add_column("\nper CPU s", justify="right")
    cells = []
    for workers in options.workers:
        bounds = [bound for (_, w), values in limits.items() if w == workers for bound in values]
        cells += [f"{statistics.median(x):,.0f}      " for x in zip(*bounds, strict=True)]
    table.add_row("decoding alone", *cells, end_section=True)
    for name in names:
        cells = []
        for workers in options.workers:
            pairs = list(zip(rates[name, workers], limits[name, workers], strict=True))
            for figure in (0, 1):
                ratio = statistics.median(rate[figure] / bound[figure] for rate, bound in pairs)
                cells.append(f"{statistics.median(rate[figure] for rate, _ in pairs):,.0f} ×{ratio:.2f}")
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
