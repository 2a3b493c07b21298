"""What a sharded checkpoint asks of each rank and of rank 0, from 8 to 4,096 ranks.

python benchmarks/checkpoint_scale.py [--ranks 8 64 512] [--millions 7000] [--blocks 32] [--measured 8]

Simulated: what each rank plans to write of a transformer with AdamW and an average under fsdp (tensors without memory,
this package's writer), and what rank 0 makes of all of them, one rank after another in one process. A rank writes one
file. "first" is the first save, "later" one of the same layout, in which a rank sends the size and checksum of its
file, and rank 0 writes the same index. "read" is what a rank touches of the index to find its own ranges, and how
long that takes. Rows beyond --ranks, up to 4,096, are lines through the last
two. Measured: --measured gloo processes of this machine save a small model three times; what is gathered is counted as
it is sent.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stamo_dist.checkpoint.manifest import Stored
from stamo_dist.checkpoint.save import Written
from stamo_dist.checkpoint.source import StateSource
from stamo_dist.checkpoint.state_writer import STATE, Layout, StateWriter
from stamo_dist.distributed.ranges import AVERAGE, MOMENTS, WEIGHT, Range
from stamo_dist.distributed.rank import World

MOST = 4096
#: Bytes a rank sends at every save: its file's size and checksum.
DIGEST = len(pickle.dumps(Written({"state/00000.safetensors": Stored(1, "0" * 41)})))


def shapes(millions: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer with nine parameters a block."""
    width = int((millions * 1e6 / blocks / 12) ** 0.5) // 128 * 128
    block = {
        "norm1": (width,), "qkv": (3 * width, width), "out": (width, width), "norm2": (width,), "gate": (width,),
        "up": (4 * width, width), "up_bias": (4 * width,), "down": (width, 4 * width), "down_bias": (width,),
    }  # fmt: skip
    layers = {f"blocks.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()}
    return {"embedding": (32_000, width), **layers, "norm": (width,)}


def held(model: dict[str, tuple[int, ...]], rank: int, ranks: int) -> list[Range]:
    """What a rank holds of weights, moments and average, without memory."""
    found = []
    for name, shape in model.items():
        rows = -(-shape[0] // ranks)
        mine = max(0, min(rows, shape[0] - rank * rows))
        if mine:
            local = torch.empty((mine, *shape[1:]), device="meta")
            parts = dict.fromkeys((WEIGHT, *MOMENTS, AVERAGE), local)
            found.append(Range(name, rank * rows * (local.numel() // mine), local.numel(), parts))
    return found


class Gathered(Layout):
    """Keeps what a rank would send."""

    rows: NDArray[np.int64]

    def agree(self, rows: NDArray[np.int64], sizes: Sequence[int]) -> None:
        self.rows, self.sizes = rows, sizes


@dataclass
class Row:
    ranks: int
    bytes: float  # a rank writes, the most
    gathered: float  # bytes by rank 0 at the first save
    first: float  # CPU seconds of rank 0's index
    later: float
    index: float  # bytes of the index
    read: float  # CPU seconds in which a rank finds its ranges


def simulated(model: dict[str, tuple[int, ...]], ranks: int) -> Row:
    steps = dict.fromkeys(model, 1000.0)
    written, sent, layout = [], [], Gathered()
    for rank in range(ranks):
        mine = held(model, rank, ranks)
        StateWriter(World(rank, ranks, 0, 1), mine, model, steps, None, layout)
        written.append(sum(4 * r.numel * len(r.parts) for r in mine))
        sent.append(layout.rows)
    row = Row(ranks, max(written), sum(len(pickle.dumps(rows)) for rows in sent), 0, 0, 0, 0)
    began = time.process_time()
    layout._index(sent, np.asarray(layout.sizes, np.int64))
    row.first = time.process_time() - began
    writer = StateWriter(World(0, ranks, 0, 1), held(model, 0, ranks), model, steps, None, layout)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / STATE).mkdir()
        began, files = time.process_time(), dict[str, Stored]()
        writer.finish(Path(folder), files)
        row.later = time.process_time() - began
        row.first += row.later
        row.index = sum(stored.bytes for stored in files.values())
        began = time.process_time()
        source = StateSource(Path(folder) / STATE)
        for r in held(model, ranks // 2, ranks):
            for part in r.parts:
                next(iter(source.pieces(part, r)))
        row.read = time.process_time() - began
    return row


def beyond(rows: list[Row]) -> list[Row]:
    """Lines through the last two rows, up to `MOST` ranks; bytes a rank writes are shares."""
    a, b = rows[-2:]
    more = []
    while (ranks := b.ranks * 2 ** (len(more) + 1)) <= MOST:

        def at(name: str, ranks: int = ranks) -> float:
            first, last = getattr(a, name), getattr(b, name)
            return float(last + (last - first) * (ranks - b.ranks) / (b.ranks - a.ranks))

        found = {name: at(name) for name in ("gathered", "first", "later", "index", "read")}
        more.append(Row(ranks, b.bytes * b.ranks / ranks, **found))
    return more


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def measure(folder: Path) -> None:
    """On each of the processes: three saves of fsdp; rank 0 prints what it found as JSON."""
    from stamo_dist.checkpoint.compatibility import RunFingerprint
    from stamo_dist.checkpoint.save import Origin, Saver
    from stamo_dist.distributed.collectives import leave
    from stamo_dist.distributed.rank import world_from_environment
    from stamo_dist.distributed.strategies import EngineSpec
    from stamo_dist.optim.ema import EMA
    from stamo_dist.optim.optimizer import adamw
    from stamo_dist.recipe import schema
    from stamo_dist.recipe.batching import batching
    from stamo_dist.recipe.training import CheckpointConfig
    from stamo_dist.run.state import RunState

    world, model = world_from_environment(), Small()
    train = schema.Train(steps=1, global_batch=world.size, micro_batch=1)
    blocks = ("TransformerEncoderLayer",)
    spec = EngineSpec(schema.Strategy(name="fsdp"), world, batching(train, world.size), 1.0, "fp32", blocks)
    engine = spec.build(model, adamw(model, schema.Optimizer(lr=1e-4)))
    with engine.accumulate():
        engine.backward(engine.module(torch.randn(1, 4, 128)).square().mean())
    origin = Origin(RunFingerprint("", {}), "fp32")
    saver = Saver(folder, engine, EMA(engine, 0.9), CheckpointConfig(keep=1), origin)
    sent, gather_object = [0], dist.gather_object

    def counted(value: Any, *rest: Any, **more: Any) -> None:
        sent[-1] += len(pickle.dumps(value))
        gather_object(value, *rest, **more)

    dist.gather_object = counted
    seconds = []
    for step in range(1, 4):
        sent.append(0)
        seconds.append(saver.save(RunState(step=step), "regular", wait=True)[-1].seconds)
    dist.gather_object = gather_object
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, sent[1:])
    if world.is_main:
        saver.close()
        files = json.loads((folder / "step_00000003/checkpoint.json").read_text())["files"]
        gathered = [sum(each) for each in zip(*everyone, strict=True)]
        print(
            json.dumps({"seconds": seconds, "gathered": gathered, "files": {n: f["bytes"] for n, f in files.items()}})
        )
    leave(0)


def run_measured(ranks: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launch, __file__, "--measure-in", f"{folder}/checkpoints"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)
    found = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    parts = [size for name, size in found["files"].items() if name.endswith(".safetensors")]
    return (
        f"measured, {ranks} gloo processes, 1.6 M parameters: {len(parts) / ranks:.0f} files a rank, at most "
        f"{max(parts) / 1e6:.2f} MB each, and an index of {len(found['files']) - len(parts)} files; "
        f"gathered on rank 0 at the 1st, 2nd, 3rd save: {', '.join(f'{n / 1e3:.1f}' for n in found['gathered'])} kB; "
        f"saved in {', '.join(f'{s:.2f}' for s in found['seconds'])} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="simulated one by one")
    parser.add_argument("--millions", type=int, default=7000)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--measured", type=int, default=8, help="processes; 0: none")
    parser.add_argument("--measure-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_in:
        measure(options.measure_in)
    model = shapes(options.millions, options.blocks)
    rows = [simulated(model, ranks) for ranks in options.ranks]
    numel = sum(torch.Size(shape).numel() for shape in model.values())
    title = f"{numel / 1e9:.1f} billion parameters in {len(model)}, AdamW, average, fsdp; (e): not simulated"
    table = Table(title=title)
    for column in (
        "ranks", "files", "MB a rank", "sent kB: first", "later", "gathered MB: first", "later", "rank 0 CPU s: first",
        "later", "index MB", "read ms",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in [*rows, *(beyond(rows) if len(rows) > 1 else [])]:
        table.add_row(
            f"{row.ranks}{'' if row.ranks in options.ranks else ' (e)'}", f"{row.ranks + 3}",
            f"{row.bytes / 1e6:.0f}", f"{row.gathered / row.ranks / 1e3:.0f}", f"{DIGEST / 1e3:.1f}",
            f"{row.gathered / 1e6:.1f}", f"{row.ranks * DIGEST / 1e6:.2f}", f"{row.first:.1f}", f"{row.later:.3f}",
            f"{row.index / 1e6:.1f}", f"{1e3 * row.read:.0f}",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if options.measured:
        console.print(run_measured(options.measured))


if __name__ == "__main__":
    main()
