"""How long training stands still for a checkpoint, beside saving while it waits and beside accelerate.save_state.

python benchmarks/checkpoint.py [--millions 300] [--strategy ddp] [--saves 3]
torchrun --nproc-per-node 2 benchmarks/checkpoint.py --strategy zero2

A transformer of that many million parameters and its AdamW state are saved by the run's own saver: waited for, and
beside the steps that follow (`train.checkpoint.background`). "cost" is all the time those steps take beyond what they
take undisturbed, the stall included; on a CPU the writer and the steps share the cores. The limit is torch.save of the
same state to the same disk, synced, without checksums; accelerate leaves the syncing to
the kernel. Medians over the saves; the first one is not counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stamo_dist.checkpoint.compatibility import RunFingerprint
from stamo_dist.checkpoint.save import Origin, Saver
from stamo_dist.distributed.collectives import barrier, broadcast, leave
from stamo_dist.distributed.rank import world_from_environment
from stamo_dist.distributed.strategies import EngineSpec
from stamo_dist.optim.optimizer import adamw
from stamo_dist.recipe import schema
from stamo_dist.recipe.batching import batching
from stamo_dist.recipe.training import CheckpointConfig
from stamo_dist.run.state import RunState

WIDTH = 1024
BLOCK = 12 * WIDTH * WIDTH  # parameters, nearly


class Model(nn.Module):
    def __init__(self, blocks: int):
        super().__init__()
        layer = [nn.TransformerEncoderLayer(WIDTH, 16, 4 * WIDTH, 0.0, batch_first=True) for _ in range(blocks)]
        self.blocks = nn.ModuleList(layer)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Training:
    """Steps of one engine."""

    def __init__(self, options: argparse.Namespace):
        world = world_from_environment()
        torch.manual_seed(0)
        model = Model(-(-options.millions * 1_000_000 // BLOCK))
        recipe = schema.Optimizer(lr=1e-4)
        train = schema.Train(steps=1, global_batch=options.batch * world.size, micro_batch=options.batch)
        spec = EngineSpec(
            schema.Strategy(name=options.strategy),
            world,
            batching(train, world.size),
            clip=1.0,
            precision="fp32",
            block_classes=("TransformerEncoderLayer",),
        )
        self.engine = spec.build(model, adamw(model, recipe))
        self.parameters = sum(p.numel() for p in model.parameters())
        self.data = torch.randn(options.batch, options.tokens, WIDTH, device=self.engine.device)

    def step(self) -> float:
        """Seconds of one step."""
        began = time.perf_counter()
        with self.engine.accumulate():
            self.engine.backward(self.engine.module(self.data).square().mean())
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def timed(call: Callable[[], Any]) -> float:
    barrier()
    began = time.perf_counter()
    call()
    barrier()
    return time.perf_counter() - began


def ours(training: Training, folder: Path, saves: int, *, background: bool, step: float) -> dict[str, float]:
    """Median seconds until the checkpoint is whole, that training stood still, and that steps took beyond theirs."""
    policy = CheckpointConfig(background=background, keep=1)
    saver = Saver(folder, training.engine, None, policy, Origin(RunFingerprint("", {}), "fp32"))
    found = []
    for number in range(1, saves + 2):
        began, steps = time.perf_counter(), 0
        ended = saver.save(RunState(step=number), "regular", wait=not background)
        while not ended:
            training.step()
            steps += 1
            ended = saver.poll()
        assert ended[-1].error is None, ended[-1].error
        cost = time.perf_counter() - began - steps * step
        found.append({"seconds": ended[-1].seconds, "stall": ended[-1].stall, "cost": cost})
    shutil.rmtree(folder, ignore_errors=True)
    return {key: statistics.median(one[key] for one in found[1:]) for key in found[0]}


def accelerate(training: Training, folder: Path, saves: int) -> float:
    seconds = []
    for _ in range(saves + 1):
        shutil.rmtree(folder, ignore_errors=True)
        seconds.append(timed(lambda: training.engine.accelerator.save_state(str(folder))))
    shutil.rmtree(folder, ignore_errors=True)
    return statistics.median(seconds[1:])


def disk(training: Training, folder: Path, saves: int) -> tuple[float, float]:
    """Seconds and bytes of torch.save of this process's parameters and AdamW state, which are in memory."""
    state = {
        "model": [p.detach() for p in training.engine.unwrapped.parameters()],
        "optimizer": [v for s in training.engine.inner_optimizer.state.values() for v in s.values()],
    }
    path = folder / f"raw_{training.engine.world.rank}.pt"

    def save() -> None:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    folder.mkdir(parents=True, exist_ok=True)
    seconds = [timed(save) for _ in range(saves + 1)]
    size = path.stat().st_size
    path.unlink()
    return statistics.median(seconds[1:]), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=300)
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"])
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; a temporary one when omitted")
    options = parser.parse_args()
    training = Training(options)
    world, on_gpu = training.engine.world, training.engine.device.type == "cuda"
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        folder = Path(broadcast(own))
        for _ in range(2):
            training.step()
        step = statistics.median(training.step() for _ in range(5))
        raw, size = disk(training, folder / "raw", options.saves)
        waited = ours(training, folder / "waited", options.saves, background=False, step=step)
        beside = ours(training, folder / "beside", options.saves, background=True, step=step)
        peer = None
        if on_gpu or options.strategy not in ("fsdp", "hsdp"):  # accelerate's FSDP needs a GPU
            peer = accelerate(training, folder / "peer", options.saves)
    if world.is_main:
        size *= world.size
        table = Table(
            title=f"{training.parameters / 1e6:.0f} M parameters, {options.strategy} on {world.size} × "
            f"{torch.cuda.get_device_name() if on_gpu else 'CPU'}, {size / 1e9:.1f} GB, a step takes {step:.2f} s"
        )
        for column in ("", "whole after s", "training waits s", "of waiting for it", "of a step", "cost s", "GB/s"):
            table.add_column(column, justify="left" if not column else "right")
        rows = [("ours, beside the training", beside), ("ours, waited for", waited)]
        if peer is not None:
            rows.append(("accelerate.save_state", {"seconds": peer, "stall": peer, "cost": peer}))
        rows.append(("torch.save, the limit", {"seconds": raw, "stall": raw, "cost": raw}))
        for name, row in rows:
            table.add_row(
                name, f"{row['seconds']:.2f}", f"{row['stall']:.2f}", f"{row['stall'] / waited['stall']:.1%}",
                f"{row['stall'] / step:.2f}", f"{row['cost']:.2f}", f"{size / row['seconds'] / 1e9:.2f}",
            )  # fmt: skip
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    leave(0)


if __name__ == "__main__":
    main()
