"""How long training stands still for a checkpoint, beside torch.save, a plain write and accelerate.save_state.

python benchmarks/checkpoint.py [--millions 300] [--strategy ddp] [--saves 3] [--waited-only]
torchrun --nproc-per-node 2 benchmarks/checkpoint.py --strategy zero2

A transformer of that many million parameters and its AdamW state are saved by the run's own saver: waited for, and
beside the steps that follow (`train.checkpoint.background`). "cost" is all the time those steps take beyond what they
take undisturbed, the stall included; on a CPU the writer and the steps share the cores. Limits, each process with its
own file of its share of the same tensors: torch.save and fsync; and the bytes, which are in memory, written and synced
without a checksum. accelerate leaves the syncing to the kernel. Each way keeps its last save until the new one is
whole; deleting it is not counted. What is waited for is measured in turns; medians over the saves but the first.
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
from _beside import beside
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from stamo_dist.checkpoint.compatibility import RunFingerprint
from stamo_dist.checkpoint.save import Origin, Saver
from stamo_dist.device import Device
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
        Device.current().synchronize()
        return time.perf_counter() - began


def timed(call: Callable[[], Any]) -> float:
    barrier()
    began = time.perf_counter()
    call()
    barrier()
    return time.perf_counter() - began


class Ours:
    """The run's own saver."""

    def __init__(self, training: Training, folder: Path, *, background: bool):
        policy = CheckpointConfig(background=background, keep=1)
        origin = Origin(RunFingerprint("", {}), "fp32")
        self._training, self._background, self._number = training, background, 0
        self._saver = Saver(folder, training.engine, None, policy, origin)

    def save(self, step: float) -> dict[str, float]:
        """Seconds until the checkpoint is whole, that training stood still, and that steps took beyond `step` each."""
        self._number += 1
        began, steps = time.perf_counter(), 0
        ended = self._saver.save(RunState(step=self._number), "regular", wait=not self._background)
        while not ended:
            self._training.step()
            steps += 1
            ended = self._saver.poll()
        assert ended[-1].error is None, ended[-1].error
        cost = time.perf_counter() - began - steps * step
        self._saver.close()
        return {"seconds": ended[-1].seconds, "stall": ended[-1].stall, "cost": cost}


def own_tensors(training: Training) -> list[Tensor]:
    """This process's share of the weights and AdamW's state, which is what a checkpoint holds of it."""
    state = training.engine.inner_optimizer.state
    tensors = [t for p, values in state.items() for t in (p.detach(), *values.values()) if isinstance(t, Tensor)]
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def torch_save(tensors: list[Tensor]) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        with path.open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    return save


def plain_write(tensors: list[Tensor]) -> Callable[[Path], None]:
    parts = [memoryview(t.cpu().contiguous().view(-1).view(torch.uint8).numpy()) for t in tensors]

    def save(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            for part in parts:
                done = 0
                while done < len(part):
                    done += file.write(part[done:])
            os.fsync(file.fileno())

    return save


class Peer:
    """Another way to save, which as ours keeps what it saved before until the new one is there."""

    def __init__(self, folder: Path, save: Callable[[Path], Any]):
        self._paths, self._save = [folder / "old", folder / "new"], save
        folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> dict[str, float]:
        seconds = timed(lambda: self._save(self._paths[1]))
        self._paths.reverse()
        if self._paths[1].is_dir():
            shutil.rmtree(self._paths[1], ignore_errors=True)
        else:
            self._paths[1].unlink(missing_ok=True)
        return {"seconds": seconds, "stall": seconds, "cost": seconds}


def waited(training: Training, folder: Path, saves: int, step: float) -> dict[str, dict[str, float]]:
    """Medians of all ways to save that are waited for, in turns."""
    engine, tensors = training.engine, own_tensors(training)
    own, mine = folder / f"rank_{engine.world.rank}", Ours(training, folder / "waited", background=False)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "write + fsync": Peer(own / "write", plain_write(tensors)).save,
        "torch.save + fsync": Peer(own / "torch", torch_save(tensors)).save,
        "ours, waited for": lambda: mine.save(step),
    }
    # accelerate's FSDP needs a GPU
    if Device.current().is_gpu or engine.strategy not in ("fsdp", "hsdp"):
        ways["accelerate.save_state"] = Peer(
            folder / "peer", lambda path: engine.accelerator.save_state(str(path))
        ).save
    found = [{name: save() for name, save in ways.items()} for _ in range(saves + 1)]
    return {name: medians([turn[name] for turn in found[1:]]) for name in ways}


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=300)
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"])
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; a temporary one when omitted")
    parser.add_argument("--waited-only", action="store_true", help="not beside the training")
    options = parser.parse_args()
    training = Training(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        folder = Path(broadcast(own))
        for _ in range(2):
            training.step()
        step = statistics.median(training.step() for _ in range(5))
        rows = waited(training, folder, options.saves, step)
        if not options.waited_only:
            beside = Ours(training, folder / "beside", background=True)
            rows["ours, beside the training"] = medians([beside.save(step) for _ in range(options.saves + 1)][1:])
    if training.engine.world.is_main:
        show(training, rows, step)
    leave(0)


def show(training: Training, rows: dict[str, dict[str, float]], step: float) -> None:
    world = training.engine.world
    size = world.size * sum(t.numel() * t.element_size() for t in own_tensors(training))
    table = Table(
        title=f"{training.parameters / 1e6:.0f} M parameters, {training.engine.strategy} on {world.size} × "
        f"{Device.current().name}, {size / 1e9:.1f} GB, a step takes {step:.2f} s"
    )
    for column in ("", "whole after s", "÷ torch.save", "÷ write", "training waits s", "of a step", "cost s", "GB/s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        limits = (rows["torch.save + fsync"]["seconds"], rows["write + fsync"]["seconds"])
        table.add_row(
            name, f"{row['seconds']:.2f}", *(f"{row['seconds'] / limit:.2f}" for limit in limits),
            f"{row['stall']:.2f}", f"{row['stall'] / step:.2f}", f"{row['cost']:.2f}",
            f"{size / row['seconds'] / 1e9:.2f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    waited, plain = rows["ours, waited for"]["seconds"], rows["torch.save + fsync"]["seconds"]
    beside("checkpoint waited for, of torch.save's seconds", 100 * waited / plain, 100, "%", other="goal")
    if (row := rows.get("ours, beside the training")) is not None:
        beside("training waits for one in background, of a step", row["stall"] / step, None, "steps")


if __name__ == "__main__":
    main()
