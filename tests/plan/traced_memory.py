"""The bytes of one of eight processes while it trains: real steps of one process, whose collectives are fake ones."""

import gc
import itertools
import os
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stamo_dist.recipe.schema import Recipe

if TYPE_CHECKING:
    from warm import Warm

DEVICES = 8
BUCKET = 2_000_000  # of ZeRO: as small beside the model as the product's is


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that were made inside and still live; `peak` is the most since `reset`.

    Each number that is read is 1: fake collectives leave what they should fill as it is, which may be NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}  # of those that live, by what stands for each
        self._numbers = WeakKeyDictionary[Any, int]()
        self._next = itertools.count()

    def __enter__(self) -> "LiveBytes":
        resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:  # as FSDP takes and gives back what it gathers
            found = resize(storage, size)
            if storage in self._numbers:
                self._count(storage)
            return found

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resized)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            return 1.0
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out

    def see(self, tree: Any) -> None:
        """Count the tensors of a tree."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                # Of a DTensor its shard: what wraps that has a storage of the whole's size and no memory.
                held = getattr(tensor, "_local_tensor", tensor)
                if not held.is_meta:
                    self._count(held.untyped_storage())

    def _count(self, storage: Any) -> None:
        number = self._numbers.get(storage)
        if number is None:
            self._numbers[storage] = number = next(self._next)
            weakref.finalize(storage, self._forget, number)
        size = storage.nbytes()
        self._now += size - self._sizes.get(number, 0)
        self._sizes[number] = size
        self.peak = max(self.peak, self._now)

    def _forget(self, number: int) -> None:
        self._now -= self._sizes.pop(number)

    def reset(self) -> None:
        gc.collect()
        self.peak = self._now


def measure(warm: "Warm", path: Path, settings: list[str]) -> int:
    """Bytes of a process in its second step of a recipe's tokenizer."""
    done = warm.run(path, *settings, program=Path(__file__))
    assert not done.returncode, done.stderr
    return int(done.stdout.split()[-1])


# DDP looks at the annotations, which must be no strings: hence no `from __future__ import annotations` here.
def _as_it_is(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _train(path: str, settings: list[str]) -> int:
    import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from stamo_dist.distributed import strategies
    from stamo_dist.recipe.load import load

    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(DEVICES), "LOCAL_WORLD_SIZE": str(DEVICES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    config = strategies._deepspeed_config

    def as_on_gpu(*arguments: Any) -> dict[str, Any]:
        found = config(*arguments)
        found["zero_optimization"]["overlap_comm"] = True
        return found

    strategies.REDUCE_BUCKET, strategies._deepspeed_config = BUCKET, as_on_gpu
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=DEVICES)
    return _peak(load(path, settings).recipe)


def _peak(recipe: Recipe) -> int:
    from stamo_dist.data.loader import Batch, Cursor
    from stamo_dist.distributed.rank import World
    from stamo_dist.distributed.strategies import EngineSpec
    from stamo_dist.optim.ema import EMA
    from stamo_dist.optim.optimizer import adamw
    from stamo_dist.recipe.batching import batching
    from stamo_dist.tasks.noise import Noise
    from stamo_dist.tasks.tokenizer import TokenizerTask

    plan, task = batching(recipe.train, DEVICES), TokenizerTask(recipe)
    size, ids = recipe.data.image_size, torch.arange(plan.per_rank)
    images = torch.zeros(plan.per_rank, size, size, 3, dtype=torch.uint8)
    batch = Batch(images, ids, torch.zeros_like(ids), Cursor())
    with LiveBytes() as live:
        live.see([*task.tokenizer.parameters(), *task.tokenizer.buffers()])
        optimizer = adamw(task.trained, recipe.optimizer)
        for group in optimizer.param_groups:
            group["fused"] = True  # as on a GPU: it takes no memory of its own
        spec = EngineSpec(recipe.strategy, World(0, DEVICES, 0, DEVICES), plan, 1.0, "bf16", task.block_classes)
        engine = spec.build(task.trained, optimizer)
        del optimizer
        if isinstance(engine.module, DistributedDataParallel):  # a fake collective's future holds nothing
            engine.module.register_comm_hook(None, _as_it_is)
        task.place(engine.device, torch.bfloat16)
        average = EMA(engine, 0.999)
        for step in (1, 2):  # the first makes the optimizer's states
            live.reset()
            for micro in batch.split(plan.micro_batch):
                with engine.accumulate():
                    engine.backward(task.loss(engine.module, micro, Noise(0).at(step)).loss)
            average.update(step)
    return live.peak


if __name__ == "__main__":
    print(_train(sys.argv[1], sys.argv[2:]), flush=True)
    os._exit(0)
