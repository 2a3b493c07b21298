"""Hooks around the steps: first images, evaluation, metrics, heartbeats, divergence and checkpoints.

`setup.build` lists them; they are called in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stamo_dist.checkpoint.save import Saved, Saver
from stamo_dist.data.loader import Batch
from stamo_dist.distributed.collectives import barrier
from stamo_dist.errors import RunError
from stamo_dist.exit_codes import EXIT_PREEMPTED
from stamo_dist.faults.signals import ShutdownBudget, ShutdownRequest, describe_requests
from stamo_dist.faults.watchdog import Watchdog
from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.state import RunState
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.tracking.metrics import Reducer, Stopwatch
from stamo_dist.tracking.pictures import save_grid
from stamo_dist.training.divergence import check_skipped
from stamo_dist.training.evaluation import Evaluation
from stamo_dist.training.trainer import Exit, Hook, StepResult
from stamo_dist.training.trial_export import TrialExport


class FirstBatchHook(Hook):
    """Rank 0: writes an image of the first frames."""

    def __init__(self, picture: Path, sources: list[str], logger: RunLogger):
        self._picture, self._sources, self._logger = picture, sources, logger

    def before_step(self, state: RunState, batch: Batch) -> None:
        if state.step:
            return
        try:
            save_grid(self._picture, batch.images[:32], [self._sources[s] for s in batch.source[:32].tolist()])
            self._logger.log_image("first_batch", self._picture, 1)
        except OSError as e:
            self._logger.info(f"{self._picture}: not written ({e.strerror})")


class BatchSizeHook(Hook):
    """Logs where the global batch changes."""

    def __init__(self, sizes: BatchSizes, logger: RunLogger):
        self._sizes, self._logger = sizes, logger

    def before_step(self, state: RunState, batch: Batch) -> None:
        after = self._sizes.batches(batch.cursor.samples)
        if after - 1 in self._sizes.starts[1:]:
            before, now = self._sizes.at(after - 2), self._sizes.at(after - 1)
            self._logger.info(f"global batch {before} → {now} from step {state.step + 1} on")


class EvaluateHook(Hook):
    """Evaluates saved checkpoints. If that blocks training, the other ranks wait."""

    def __init__(self, evaluation: Evaluation, recipe: Recipe, logger: RunLogger, watchdog: Watchdog):
        self._evaluation, self._recipe, self._logger, self._watchdog = evaluation, recipe, logger, watchdog

    def on_start(self, state: RunState) -> None:
        self._measure(state.step, partial(self._evaluation.begin, state.step, self._logger))

    def after_step(self, state: RunState, result: StepResult) -> None:
        self._evaluation.poll()

    def saved(self, step: int) -> bool:
        """The checkpoint of `step` is complete: evaluate it if due. Returns whether training was blocked."""
        return self._measure(step, partial(self._evaluation.saved, step))

    def _measure(self, step: int, measure: Callable[[], bool | None]) -> bool:
        if not self._recipe.evaluate.holds_up(step):
            return bool(measure())
        self._watchdog.mark("evaluating", step)
        measure()
        barrier()
        return True


class LogHook(Hook):
    """Reduces the metrics over the ranks, and logs each step once the device has finished it: one step later.

    `signals`: rank → signal that requests it to stop, known to all ranks. `step_seconds`: of the last logged step.
    """

    def __init__(
        self, logger: RunLogger, reducer: Reducer, clock: Stopwatch, stop: ShutdownRequest, recipe: Recipe
    ) -> None:
        self._logger, self._reducer, self.clock, self._stop, self._recipe = logger, reducer, clock, stop, recipe
        self.signals: dict[int, str] = {}
        self.step_seconds = 0.0
        self._ended = RunState()  # state after the step that is still to be logged

    def on_start(self, state: RunState) -> None:
        self.clock.reset()

    def after_step(self, state: RunState, result: StepResult) -> None:
        self.flush(state)
        self._reducer.put(
            state.step,
            result.sums,
            grad_norm=result.grad_norm,
            rates=result.rates,
            times=self.clock.step_done(),
            signal=self._stop.signal or 0,
        )
        self._ended = replace(state)
        self._logger.log_samples(state.step, result.batch)

    def flush(self, state: RunState) -> None:
        """Log the step that was reduced last, and add to `state` the values known only after the reduction.

        Raises:
            RunError: More samples of a source were unreadable than the recipe allows.
        """
        reduced = self._reducer.take()
        if reduced is None:
            return
        self.signals, self.step_seconds = self.signals or reduced.signals, reduced.seconds
        state.seconds += reduced.seconds
        state.samples = [a + b for a, b in zip(state.samples, reduced.counts, strict=True)]
        state.skipped = [a + b for a, b in zip(state.skipped, reduced.skipped, strict=True)]
        self._logger.log_step(reduced, replace(self._ended, seconds=state.seconds))
        check_skipped(state, list(self._recipe.data.used), self._recipe.data)


class HeartbeatHook(Hook):
    """Reports this rank's progress to the watchdog."""

    def __init__(self, watchdog: Watchdog):
        self._watchdog = watchdog

    def after_step(self, state: RunState, result: StepResult) -> None:
        self._watchdog.finished(state.step)


class CheckpointHook(Hook):
    """Saves the state when due or when the run is asked to stop, and then exits.

    `budget`: rank 0's.
    """

    def __init__(
        self,
        saver: Saver,
        log: LogHook,
        evaluate: EvaluateHook,
        logger: RunLogger,
        watchdog: Watchdog,
        budget: ShutdownBudget | None,
        trial: TrialExport,
    ) -> None:
        self._saver, self._log, self._evaluate, self._logger = saver, log, evaluate, logger
        self._watchdog, self._budget, self._trial = watchdog, budget, trial
        self._failed = dict[str, Any]()  # facts of the last save, if it failed

    def on_start(self, state: RunState) -> None:
        self._trial.on_start(state.step)

    def after_step(self, state: RunState, result: StepResult) -> Exit | None:
        last = state.step == self._trial.steps
        trial = self._trial.due(state.step, self._log.step_seconds)
        kind = self._saver.due(state.step, last=last) or ("temporary" if trial else None)
        now = bool(self._log.signals or kind)
        if not now and self._report(self._saver.poll()):
            self._log.clock.reset()
        if last or self._log.signals:  # no line comes after this save
            self._logger.drop_metrics(*self._failed)
        else:
            self._logger.add_metrics(**self._failed)  # in each line until one succeeds
        if not now:
            return None
        self._log.flush(state)
        ended = self._save(state, kind or "temporary", last=last, trial=trial)
        self._log.clock.reset()
        return ended

    def finish(self, step: int) -> None:
        """Wait for a running save, if any; the run is after `step`."""
        self._watchdog.mark("saving", step)
        self._report(self._saver.poll(wait=True))

    def _save(self, state: RunState, kind: str, *, last: bool, trial: bool) -> Exit | None:
        waits = last or trial or bool(self._log.signals)
        if waits:
            self.finish(state.step)  # and evaluate it while it exists
        self._watchdog.mark("saving", state.step)
        self._logger.sync()
        ended = self._saver.save(state, kind, wait=waits)
        self._report(ended)
        if last and ended[-1].error:
            raise RunError(f"the last step could not be saved: {ended[-1].error}; make room and start again")
        if self._log.signals and not last:
            asked = describe_requests(self._log.signals)
            self._logger.info(f"{asked}: {ended[-1]}; leaving with code {EXIT_PREEMPTED}; the same command goes on")
            return Exit.PREEMPTED
        if trial and not ended[-1].error:
            self._trial.run(state.step)
        return None

    def _report(self, ended: list[Saved]) -> bool:
        """Log the results of these saves, and evaluate those that are due; returns whether any was evaluated."""
        measured = False
        for saved in ended:
            self._logger.info(str(saved))
            if saved.error is None:
                self._logger.drop_metrics(*self._failed)
            self._logger.add_metrics(**saved.facts())
            self._failed = saved.facts() if saved.error else {}
            self._watchdog.saving_takes = max(self._watchdog.saving_takes, saved.seconds)
            if self._budget is not None and saved.error is None and not saved.beside:
                for note in self._budget.measured(self._log.step_seconds, saved.seconds):
                    self._logger.info(f"  {note}")
            if saved.error is None and not self._log.signals:
                measured = self._evaluate.saved(saved.step) or measured
        return measured


class DivergenceHook(Hook):
    """Requests a rollback after too many consecutive non-finite losses or gradients; before `CheckpointHook`."""

    def __init__(self, most: int, log: LogHook, checkpoint: CheckpointHook):
        self._most, self._log, self._checkpoint = most, log, checkpoint

    def after_step(self, state: RunState, result: StepResult) -> Exit | None:
        if state.bad_in_a_row < self._most:
            return None
        self._log.flush(state)
        self._checkpoint.finish(state.step)
        return Exit.DIVERGED
