"""The loop. Every stage, every strategy and every start of a run goes through `Trainer.fit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from stamo_dist.data.loader import Batch, Loader
from stamo_dist.distributed.engine import Engine, Phase
from stamo_dist.exit_codes import EXIT_PREEMPTED
from stamo_dist.optim.ema import EMA
from stamo_dist.optim.optimizer import own_rates
from stamo_dist.optim.schedule import RateSchedule
from stamo_dist.recipe.batching import Batching
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.state import RunState
from stamo_dist.tasks.base import Task
from stamo_dist.tasks.noise import Noise
from stamo_dist.tracking.metrics import StepSums


class Exit(IntEnum):
    """How the loop ends."""

    FINISHED = 0
    PREEMPTED = EXIT_PREEMPTED
    DIVERGED = -1  # roll back: the run continues from an earlier checkpoint


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step on this process."""

    batch: Batch
    sums: StepSums
    rates: Mapping[str, float]  # "lr", the schedule's, and lr/NAME of parameters with another one
    grad_norm: float  # over all processes, before clipping

    @property
    def good(self) -> bool:
        """Whether the weights were updated; the same on all processes."""
        return math.isfinite(self.grad_norm)


class Hook:
    """Called around the steps, in one order on every process."""

    def on_start(self, state: RunState) -> None:
        """The run continues after `state.step`, at a start or after a rollback."""

    def before_step(self, state: RunState, batch: Batch) -> None:
        """`state` before the step; `batch`: this rank's share, still on the host."""

    def after_step(self, state: RunState, result: StepResult) -> Exit | None:
        """`state` after the step. Returns how the loop ends, None to continue."""
        return None


@dataclass
class Trainer:
    """One start of a run, from `state` to the end or to the next stop.

    Attributes:
        schedule: Learning rate by update.
        batchings: How the batches of each size are spread, in the order of the run.
        open_loader: Opens this rank's batches from a state on.
        on_phase: Called with the phase that this rank begins, and the step.
        hooks: Hooks in calling order.
        go_back: Rolls back after divergence; returns the state to continue from.
    """

    recipe: Recipe
    task: Task
    engine: Engine
    ema: EMA | None
    state: RunState
    schedule: RateSchedule
    batchings: Sequence[Batching]
    open_loader: Callable[[RunState], Loader]
    on_phase: Callable[[Phase, int], None]
    hooks: Sequence[Hook]
    go_back: Callable[[RunState], RunState]

    def __post_init__(self) -> None:
        self._noise = Noise(self.recipe.seed)
        self._own_rates = own_rates(self.task.trained, self.recipe.optimizer)
        self._batching = self.batchings[0]  # the engine's
        self._cold = True
        self.engine.on_phase = self._begin

    def fit(self) -> Exit:
        """Train to the last step, or until a hook ends the loop."""
        while (ended := self._fit()) is Exit.DIVERGED:
            self.state = self.go_back(self.state)
        return ended

    def _fit(self) -> Exit:
        for hook in self.hooks:
            hook.on_start(self.state)
        self._cold = True
        with closing(self.open_loader(self.state)) as loader:
            batches = iter(loader)
            while self.state.step < self.recipe.train.steps:
                self._begin(Phase.WAITING)
                batch = next(batches)
                self._begin(Phase.COMPUTING)
                for hook in self.hooks:
                    hook.before_step(self.state, batch)
                result = self.step(batch)
                self.state.advance(batch.cursor.to_dict(), good=result.good)
                for hook in self.hooks:
                    if (ended := hook.after_step(self.state, result)) is not None:
                        return ended
        return Exit.FINISHED

    def step(self, batch: Batch) -> StepResult:
        """Forward, backward, clip, update and average: one optimizer step of all processes."""
        update = self.state.updates + 1
        lr = self.schedule.at(update)
        self.engine.set_lr(lr, update)
        torch.manual_seed(_seed(self.recipe.seed, self.state.step, self.engine.world.rank))
        sums = StepSums.empty(self.task.terms, len(self.recipe.data.used), self.engine.device)
        self._spread(len(batch))
        micros = batch.to(self.engine.device).split(self._batching.micro_batch)
        if self._cold:
            self.engine.warm_up_buckets(lambda: self._loss(micros[0]))
            self._cold = False
        for micro in micros:
            with self.engine.accumulate():
                grad_norm = self.engine.backward(self._loss(micro, sums))
        assert grad_norm is not None, "the last micro-batch of a step must step the optimizer"
        if math.isfinite(grad_norm) and self.ema is not None:
            self.ema.update(update)
        rates = {"lr": lr, **{f"lr/{own.name}": own.at(lr, update) for own in self._own_rates}}
        return StepResult(batch, sums, rates, grad_norm)

    def _spread(self, samples: int) -> None:
        """Have the engine sum the micro-batches of a batch with so many samples on this process."""
        if samples != self._batching.per_rank:
            self._batching = next(b for b in self.batchings if b.per_rank == samples)
            self.engine.spread(self._batching)

    def _loss(self, micro: Batch, sums: StepSums | None = None) -> Tensor:
        out = self.task.loss(self.engine.module, micro, self._noise.at(self.state.step + 1))
        if sums is not None:
            sums.add(out.per_sample, micro.source, micro.replaced, out.present)
        return out.loss

    def _begin(self, phase: Phase) -> None:
        self.on_phase(phase, self.state.step + 1)


def _seed(*numbers: int) -> int:
    """For what layers draw themselves, such as dropout: it depends on the step alone, so no state of it is saved."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
