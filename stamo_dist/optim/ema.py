"""Exponential moving average of the trained weights, distributed over the processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from stamo_dist.distributed.engine import Engine
from stamo_dist.distributed.ranges import AVERAGE, WEIGHT, Range, own, trained_ranges


class EMA:
    """fp32 average of every trainable parameter: ē ← d·ē + (1−d)·θ.

    d at step t is min(decay, (1+t)/(10+t)): early averages forget the initial weights. θ is what AdamW steps: the fp32
    master copy where the model computes in bf16. A process keeps the elements of its shards of θ, and of what several
    processes hold alike an equal share.
    """

    def __init__(self, engine: Engine, decay: float):
        self._decay = decay
        self._own = own(trained_ranges(engine))
        self._average = self._weights()

    def _weights(self) -> list[Tensor]:
        """Copies in fp32 of what this process keeps, flat."""
        return [r.flat(WEIGHT).to(torch.float32, copy=True) for r in self._own]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update with the weights after the 1-based optimizer `step`."""
        if not self._average:  # more processes than parameters have elements
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [r.flat(WEIGHT).float() for r in self._own], 1 - decay)

    def held(self) -> Iterator[Range]:
        """This process's part of the average; tensors are the live ones."""
        for r, average in zip(self._own, self._average, strict=True):
            yield replace(r, parts={AVERAGE: average}, offset=0)

    def begin(self) -> None:
        """Start from the weights as they are now."""
        self._average = self._weights()
