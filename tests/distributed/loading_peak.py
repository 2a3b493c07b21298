"""The memory of a rank while it builds and loads a policy: `loading_peak.py RANK PORT RECIPE STRATEGY META_INIT`."""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import threading
import time
from pathlib import Path

import torch

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.data.mixture import Mixture
from stamo_dist.distributed.ranges import WEIGHT, other_ranges, own, shapes, trained_ranges
from stamo_dist.distributed.rank import World
from stamo_dist.distributed.strategies import EngineSpec
from stamo_dist.optim.optimizer import adamw
from stamo_dist.recipe.batching import batching
from stamo_dist.recipe.load import load
from stamo_dist.recipe.training import Strategy
from stamo_dist.tasks import build_task


def private_bytes() -> int:
    """Memory of this process that is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


class Peak:
    """The most private memory while it is watched, over what there was before."""

    def __enter__(self) -> Peak:
        self._before, self.bytes, self._on = private_bytes(), 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.bytes = max(self.bytes, private_bytes() - self._before)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


def main(rank: int, port: str, recipe: str, strategy: str, *, meta_init: bool) -> None:
    """Prints the peak, what the rank holds of each weight (where it begins, sums), and the bytes of all weights."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is given back, and not kept for later
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )  # fmt: skip
    r = load(recipe).recipe
    mixture = Mixture(r.data, seed=0, global_batch=8)
    if strategy == "zero3":
        from deepspeed.runtime.zero import Init  # noqa: F401  which takes memory of its own
    with Peak() as peak:
        task = build_task(r, mixture, meta_init=meta_init)
        world = World(rank, 2, rank, 2)
        spec = EngineSpec(Strategy(name=strategy), world, batching(r.train, 2), 1.0, "fp32", task.block_classes)
        accelerator = spec.connect()
        if strategy == "fsdp":
            engine = spec.build(task.trained, adamw(task.trained, r.optimizer), accelerator)
        elif meta_init:
            spec.give_memory(task.trained, accelerator)
        if meta_init:
            task.load_weights()
    if strategy == "zero3":  # which makes masters, moments and buffers besides
        engine = spec.build(task.trained, adamw(task.trained, r.optimizer), accelerator)
    held = [*trained_ranges(engine), *other_ranges(engine)]
    elements = {r.name: (r.start, r.flat(WEIGHT).double().sum().item(), r.flat(WEIGHT).double().square().sum().item())
                for r in own(held)}  # fmt: skip
    if strategy == "fsdp":
        trained = {id(p) for p in task.trained.parameters() if p.requires_grad}
        assert {id(p) for group in engine.optimizer.param_groups for p in group["params"]} == trained
    print(json.dumps([peak.bytes, elements, 4 * sum(math.prod(s) for s in shapes(task.trained).values())]), flush=True)
    torch.distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5], meta_init=sys.argv[5] == "True")
