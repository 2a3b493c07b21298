"""What `stamo plan` predicts beside what a real run takes.

    python benchmarks/plan_memory.py recipes/policy_openvla_state_demo.yaml --processes 2 --set train.global_batch=256

Each strategy trains a few steps of the recipe in processes of its own. On a GPU the peak is the allocator's, on a CPU
the private memory of a process over what it had before it built the model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

#: Freed tensors go back to the system at once, so that what a process holds is what it uses.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def private_bytes() -> int:
    """Memory of this process that is no mapped file."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


class Watch(threading.Thread):
    """The most private memory until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._on = 0, True

    def run(self) -> None:
        while self._on:
            self.peak = max(self.peak, private_bytes())
            time.sleep(0.002)

    def stop(self) -> int:
        self._on = False
        self.join()
        return self.peak


def rank(number: int, world: int, port: int, path: str, settings: list[str], steps: int, answer: Connection) -> None:
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
    import torch

    from stamo_dist.data.loader import CacheKeys, Cursor, build_loader
    from stamo_dist.data.mixture import Mixture
    from stamo_dist.device import Device
    from stamo_dist.distributed.rank import world_from_environment
    from stamo_dist.distributed.strategies import SUPPORTS_META_INIT, EngineSpec
    from stamo_dist.optim.ema import EMA
    from stamo_dist.optim.optimizer import adamw
    from stamo_dist.recipe.batching import batching
    from stamo_dist.recipe.load import load
    from stamo_dist.tasks import build_task
    from stamo_dist.tasks.noise import Noise

    device = Device.current()
    if not device.is_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401  its import is no part of the model

    recipe = load(path, settings).recipe
    mixture = Mixture(recipe.data, seed=0, global_batch=recipe.train.global_batch)
    before, watch = private_bytes(), Watch()
    watch.start()
    plan = batching(recipe.train, world)
    task = build_task(recipe, mixture, meta_init=recipe.strategy.name in SUPPORTS_META_INIT)
    spec = EngineSpec(recipe.strategy, world_from_environment(), plan, 1.0, recipe.train.precision, task.block_classes)
    engine = spec.build(task.trained, adamw(task.trained, recipe.optimizer))
    task.place(engine.device, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    task.load_weights()
    average = EMA(engine, recipe.train.ema) if recipe.train.ema else None
    noise = Noise(0)
    caches = CacheKeys(task.latents)
    loader = build_loader(mixture, rank=number, world_size=world, cursor=Cursor(), workers=0, caches=caches)
    with closing(loader):
        batches = iter(loader)
        for step in range(steps):
            for micro in next(batches).to(engine.device).split(plan.micro_batch):
                with engine.accumulate():
                    engine.backward(task.loss(engine.module, micro, noise.at(step)).loss)
            if average is not None:
                average.update(step + 1)
    peak = watch.stop() - before
    answer.send(device.peak_memory()[0] if device.is_gpu else peak)
    torch.distributed.barrier()
    os._exit(0)


def measure(path: str, settings: list[str], world: int, steps: int) -> float | None:
    """Peak bytes of the process that took most; None where one has failed, whose error is printed."""
    from stamo_dist.distributed.rank import reserve_port

    context, port, ends = multiprocessing.get_context("spawn"), reserve_port(), []
    for number in range(world):
        here, there = context.Pipe()
        process = context.Process(target=rank, args=(number, world, port, path, settings, steps, there))
        process.start()
        there.close()
        ends.append((process, here))
    try:
        return max([here.recv() for _, here in ends])
    except EOFError:
        for process, _ in ends:
            process.terminate()
        return None
    finally:
        for process, _ in ends:
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3", "fsdp"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    a = parser.parse_args()
    os.environ.update(MALLOC)
    from _beside import beside

    from stamo_dist.plan.memory import plan
    from stamo_dist.recipe.load import load

    table = Table(title=f"{a.recipe} on {a.processes} processes, {' '.join(a.set) or 'as it is'}: MB of one of them")
    for column in ("strategy", "of model", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    rows = []
    for name in a.strategies:
        settings = [*a.set, f"strategy.name={name}", "data.workers=0"]
        (memory,) = plan(load(a.recipe, settings).recipe, a.processes)
        measured = measure(a.recipe, settings, a.processes, a.steps)
        if measured is None:
            table.add_row(name, "", f"{memory.peak / 1e6:.0f}", "failed", "")
            continue
        error = memory.peak / measured - 1
        rows.append({"strategy": name, "predicted": memory.peak, "measured": measured, "error": error})
        model = memory.peak - memory.activations
        cells = [f"{value / 1e6:.0f}" for value in (model, memory.peak, measured)]
        table.add_row(name, *cells, f"{error:+.0%}")
        beside(f"memory, {name}", measured / 1e9, memory.peak / 1e9, "GB")
    Console().print(table)
    print(json.dumps(rows))
    if len(rows) < len(a.strategies):
        sys.exit(f"{len(a.strategies) - len(rows)} of {len(a.strategies)} strategies failed")


if __name__ == "__main__":
    main()
