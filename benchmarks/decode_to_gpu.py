"""How many decoded frames a second reach the device: loader, page-locked memory and copies beside the computation.

    python benchmarks/decode_to_gpu.py [--frames 4000] [--size 256] [--batch 96] [--workers 1 4 8] [--tiny]

Frames are made on the spot. Beside the loader that sends its batches to the device stands the one that leaves them on
the host, and the copies alone of batches that are ready; then what one GPU needs, which is the predicted pace of the
full-size tokenizer's training.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import count as count_up
from itertools import islice
from pathlib import Path

import torch
from _beside import beside, gpu
from _toy import jpegs
from frames import write_mds
from rich.console import Console
from rich.table import Table

from stamo_dist.data.loader import Batch, Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.device import CPU, Device
from stamo_dist.distributed.collectives import leave
from stamo_dist.plan.roofline import expect
from stamo_dist.recipe.data import Data, SourceConfig
from stamo_dist.recipe.load import load

_WARM = 4  # batches
RECIPE = Path(__file__).parents[1] / "recipes/tokenizer_sim_droid.yaml"


def rate(batches: Iterator[Batch], device: Device, count: int) -> float:
    """Frames/s of `count` batches on the device; the last is waited for."""
    for batch in islice(batches, _WARM):
        batch.to(device.torch_device)
    device.synchronize()
    start, frames = time.perf_counter(), 0
    for batch in islice(batches, count):
        frames += len(batch.to(device.torch_device))
    device.synchronize()
    return frames / (time.perf_counter() - start)


def loaded(mixture: Mixture, workers: int, device: Device, count: int) -> float:
    cursor = Cursor()
    with closing(build_loader(mixture, rank=0, world_size=1, cursor=cursor, device=device, workers=workers)) as loader:
        return rate(iter(loader), device, count)


def copied(batch: int, size: int, device: Device, count: int) -> float:
    """The limit: batches that lie in page-locked memory, one on its way while the last is taken."""
    ready = [device.pin(torch.zeros(batch, size, size, 3, dtype=torch.uint8)) for _ in range(2)]

    def batches() -> Iterator[Batch]:
        ids = torch.arange(batch)
        for number in count_up():
            yield Batch(ready[number % 2], ids, torch.zeros_like(ids), Cursor()).send(device)

    return rate(batches(), device, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--workers", type=int, nargs="+")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--tiny", action="store_true")
    o = parser.parse_args()
    if o.tiny:
        o.frames, o.size, o.batch, o.batches = 64, 64, 8, 8
    workers = o.workers or ([0, 1] if o.tiny else [1, 4, max(4, (os.cpu_count() or 4) - 2)])
    device = Device.current()
    with tempfile.TemporaryDirectory() as folder:
        write_mds(Path(folder), jpegs(o.frames, o.size), o.size)
        data = Data(sources={"s": SourceConfig(path=folder)}, image_size=o.size)
        mixture = Mixture(data, seed=0, global_batch=o.batch)
        limit = copied(o.batch, o.size, device, o.batches)
        table = Table(title=f"frames/s, {o.size} px, batches of {o.batch}, to {device.name}")
        for column in ("workers", "left on the host", "on the device", "of it"):
            table.add_column(column, justify="right")
        best = 0.0
        for number in workers:
            host, there = (loaded(mixture, number, on, o.batches) for on in (CPU, device))
            best = max(best, there)
            table.add_row(str(number), f"{host:,.0f}", f"{there:,.0f}", f"{there / host:.2f}")
        table.add_row("copies alone", "", f"{limit:,.0f}", "")
    Console().print(table)
    (needed,) = expect(load(RECIPE, ["data.latents=online"]).recipe, 1, [gpu()])
    beside("decoded frames on the device", best, needed.samples_per_second, "frames/s", other=f"needed ({needed.gpu})")
    leave(0)


if __name__ == "__main__":
    main()
