"""The trained module and its optimizer behind one interface for every strategy, on CPU (gloo) and GPU (nccl)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from stamo_dist.device import Device
from stamo_dist.distributed.rank import World
from stamo_dist.recipe.batching import Batching

if not Device.current().is_gpu:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # must precede the first import of DeepSpeed

ZERO_STAGE = {"zero1": 1, "zero2": 2, "zero3": 3}


class Phase(str, Enum):
    """The phase of a rank within a step; the value is used in messages before the step's number."""

    WAITING = "waiting for the data of"
    COMPUTING = "computing"
    DIFFERENTIATING = "differentiating"
    REDUCING = "reducing the gradients of"  # its own gradients are there
    UPDATING = "updating the weights in"


def poison_nonfinite(loss: Tensor) -> Tensor:
    """`loss`, with a non-finite gradient if its value is not finite; bitwise unchanged if it is."""
    return loss * (1 + 0 * loss.detach())


@dataclass
class Engine:
    """The trained module and its optimizer, distributed over the processes.

    `module` is called like the original. Gradients are synchronised only in `accumulate` blocks.
    """

    strategy: str
    world: World
    accelerator: Accelerator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float | None
    on_phase: Callable[[Phase], None] = lambda phase: None
    whole_gradients: bool = False  # fsdp, hsdp: between micro-batches

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's engine, under zero1–3."""
        return self.module

    @property
    def is_zero(self) -> bool:
        return self.strategy in ZERO_STAGE

    @property
    def unwrapped(self) -> nn.Module:
        """The module the task built; under zero3 and fsdp its parameters are this process's shards."""
        wrapped = self.is_zero or isinstance(self.module, DistributedDataParallel)
        return self.module.module if wrapped else self.module  # type: ignore[return-value]

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without Accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def set_lr(self, lr: float, step: int) -> None:
        """Set each parameter group's learning rate for the 1-based optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"] if step > group["start"] else 0.0

    def spread(self, batching: Batching) -> None:
        """From the next step on, sum the gradients of as many micro-batches as `batching` says."""
        accelerator = self.accelerator
        accelerator.gradient_accumulation_steps, accelerator.step = batching.divisor, 0
        if self.is_zero:
            self.deepspeed.set_train_micro_batch_size(batching.micro_batch)
            self.deepspeed.set_train_batch_size(batching.global_batch)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Context of each micro-batch: gradients are summed over the processes only at the last one.

        FSDP reduce-scatters each micro-batch's gradients within the sharding group, unless they are kept whole.
        """
        self.on_phase(Phase.COMPUTING)
        with self.accelerator.accumulate(self.module):
            if isinstance(self.module, FSDPModule):
                last = self.accelerator.sync_gradients
                self.module.set_requires_gradient_sync(last or not self.whole_gradients)
                self.module.set_requires_all_reduce(last)
            yield

    def warm_up_buckets(self, loss: Callable[[], Tensor]) -> None:
        """Before the first step of a start: fix the order in which gradients are reduced; nothing else changes.

        PyTorch's DDP regroups them after its first backward pass, and the sum of three or more numbers depends on
        their order: the first step after a resumption would differ from that of a run that was never stopped.
        """
        if isinstance(self.module, DistributedDataParallel) and self.world.size > 2:
            loss().backward()
            self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> float | None:
        """Backward pass of one micro-batch; at the last one clip and step.

        Returns None between optimizer steps, else the norm of the gradient over all processes, before clipping. If
        it is not finite on any process, no process has stepped; a non-finite loss makes it non-finite.
        """
        self.on_phase(Phase.DIFFERENTIATING)
        loss, last = poison_nonfinite(loss), self.accelerator.sync_gradients
        if last:
            self._mark_own_gradients(loss)
        if self.is_zero:  # Accelerate's backward would step too
            self.deepspeed.set_gradient_accumulation_boundary(last)
            self.deepspeed.backward(loss)
        else:
            self.accelerator.backward(loss)
        if not last:
            return None
        self.on_phase(Phase.UPDATING)
        if self.is_zero:  # DeepSpeed clips and steps, or skips the step
            self.deepspeed.step()
            with Device.current().meant_wait():
                return float(torch.as_tensor(self.deepspeed.get_global_grad_norm()).float())
        return self.step()

    def _mark_own_gradients(self, loss: Tensor) -> None:
        """Have the backward pass say when it ends, before it waits for what other processes add to the gradients."""

        def begin(_: Tensor) -> None:  # what is queued first is called first, and the loss comes before all layers
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.on_phase(Phase.REDUCING))

        loss.register_hook(begin)

    def step(self) -> float:
        """Clip the gradient and step, unless its norm, which is returned, is not finite. Not for ZeRO."""
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.clip or float("inf"))
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        with Device.current().meant_wait():  # a step's only one for the device
            norm = float(norm)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
