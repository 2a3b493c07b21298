"""Data parallelism with a bitwise identical gradient on any number of processes.

The global batch is cut into V virtual workers, whatever the number of processes W: number v has samples v, v + V, …
of it. Each one's gradient comes from micro-batches of one size, and the V gradients are summed as the leaves of one
binary tree, v with v + V/2 first. A process computes v = rank, rank + W, …, which form complete subtrees; the rest of
the tree is summed on every process in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from stamo_dist.distributed.engine import Engine, Phase, poison_nonfinite
from stamo_dist.recipe.batching import Batching

_BUCKET = 1 << 24  # elements exchanged at a time


@dataclass
class DeterministicEngine(Engine):
    """An `Engine` for ddp; `micro_batches` of each virtual worker, `workers` of this process."""

    workers: int = 1
    micro_batches: int = 1
    _done: int = 0  # micro-batches of this step
    #: (virtual workers in the sum, the sum by parameter): subtrees, largest first.
    _sums: list[tuple[int, list[Tensor]]] = field(default_factory=list)

    def spread(self, batching: Batching) -> None:
        super().spread(batching)
        self.micro_batches = batching.accumulation // self.workers

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        self.on_phase(Phase.COMPUTING)
        with self.accelerator.no_sync(self.module):
            yield

    def warm_up_buckets(self, loss: Callable[[], Tensor]) -> None:
        """Does nothing: the order of summation is fixed."""

    def backward(self, loss: Tensor) -> float | None:
        self.on_phase(Phase.DIFFERENTIATING)
        self.accelerator.backward(poison_nonfinite(loss))
        self._done += 1
        if self._done % self.micro_batches:
            return None
        self._add()
        if self._done < self.micro_batches * self.workers:
            return None
        self._done = 0
        [(_, gradients)] = self._sums
        self._sums.clear()
        self.on_phase(Phase.REDUCING)
        for parameter, gradient in zip(self._parameters, _over_processes(gradients), strict=True):
            parameter.grad = gradient
        self.on_phase(Phase.UPDATING)
        return self.step()

    @property
    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def _add(self) -> None:
        """Add the gradient of a finished virtual worker; two subtrees of equal size are merged."""
        size, found = 1, [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        while self._sums and self._sums[-1][0] == size:
            before = self._sums.pop()[1]
            found = [a.add_(b) for a, b in zip(before, found, strict=True)]
            size *= 2
        self._sums.append((size, found))


def _over_processes(gradients: list[Tensor]) -> list[Tensor]:
    """The sums over all processes, with each process' sum as a leaf of the same tree."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return gradients
    out: list[Tensor] = []
    for bucket in _buckets(gradients):
        flat = torch.cat([g.flatten() for g in bucket])
        leaves = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(leaves, flat)
        while (half := len(leaves) // 2) >= 1:
            leaves = [a.add_(b) for a, b in zip(leaves[:half], leaves[half:], strict=True)]
        parts = leaves[0].split([g.numel() for g in bucket])
        out += [part.view_as(g) for part, g in zip(parts, bucket, strict=True)]
    return out


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
