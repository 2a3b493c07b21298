"""Logging during training: metrics.jsonl, samples.jsonl, W&B, TensorBoard and the terminal's progress line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stamo_dist.data.loader import Batch
from stamo_dist.device import Device
from stamo_dist.distributed.rank import World
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.state import RunState
from stamo_dist.tracking.alarms import SpikeAlarms, alarm_text, steps_before
from stamo_dist.tracking.metrics import Reduced
from stamo_dist.tracking.metrics_file import MetricsFile, read_late
from stamo_dist.tracking.progress import TrainingProgress
from stamo_dist.tracking.samples import SampleLog
from stamo_dist.tracking.system import SystemUse
from stamo_dist.tracking.tensorboard import TensorBoard, check_installed
from stamo_dist.tracking.wandb import WandB


class RunLogger:
    """Every rank has one; only rank 0's writes.

    Args:
        recipe, resolved: The recipe, and as plain values.
        run: The run folder to write to.
        world: This process's rank.
        sources: Names of the mixture's sources.
        flops: FLOPs of one sample, for the share of the device's peak; None for none.
        step: The last step before this start.
        guard: Raises if this process may no longer write.
    """

    def __init__(
        self,
        recipe: Recipe,
        resolved: dict[str, Any],
        run: RunFolder,
        world: World,
        sources: list[str],
        flops: float | None,
        step: int,
        guard: Callable[[], None] | None = None,
    ):
        self._recipe, self._run, self._world, self._sources, self._flops = recipe, run, world, sources, flops
        self._guard, self._extra = guard, dict[str, Any]()
        self._began, self._changed = step, dict[str, list[str]]()
        self._file = MetricsFile(run.metrics, step, guard) if world.is_main else None
        self._samples = SampleLog(run.samples, step, world, guard) if recipe.train.log_samples else None
        if recipe.tracking.tensorboard:
            check_installed()
        self._wandb = WandB(recipe, run.path, resolved) if world.is_main else None
        self._board = TensorBoard(run.path, step) if world.is_main and recipe.tracking.tensorboard else None
        self._system = SystemUse(run.path) if world.is_main else None
        self._alarms = self._watch() if world.is_main else None
        self._progress = TrainingProgress(recipe.train.steps, step, shown=world.is_main)
        for part in (self._file, self._samples):
            for note in part.notes if part is not None else ():
                self.info(note)

    def info(self, text: str) -> None:
        self._progress.say(text)

    def log_step(self, reduced: Reduced, state: RunState) -> None:
        """Log the step that ended in `state`."""
        train = self._recipe.train
        rate = sum(reduced.counts) / reduced.seconds
        mfu = self._mfu(rate)
        good = math.isfinite(reduced.grad_norm)
        if self._file is not None and (reduced.step % train.log_every == 0 or not good):
            line = reduced.line(self._sources, rate=rate, seconds=state.seconds, mfu=mfu, bad_steps=state.bad_steps)
            if len(train.batches.sizes) > 1:
                line["global_batch"] = sum(reduced.counts)
            line |= self._extra | (self._system.look() if self._system is not None else {})
            self._extra = {}
            if self._alarms is not None and (alarms := self._alarms.look(line)):
                line["alarms"] = alarms
                self.info(f"ALARM {alarm_text(line)}")
            self._file.write(line)
            if self._wandb is not None:
                self._wandb.log(line)
            if self._board is not None:
                self._board.log(line)
        if not good:
            self.info(
                f"step {reduced.step}: {reduced.blame}: no update; {state.bad_in_a_row} in a row "
                f"(train.max_bad_steps: {train.max_bad_steps})"
            )
        self._progress.update(reduced.step, next(iter(reduced.losses.values())), rate, reduced.data_wait, mfu)

    def log_samples(self, step: int, batch: Batch) -> None:
        """Log the samples that this rank trained on in `step`; a collective."""
        if self._samples is not None:
            self._samples.write(step, batch)

    def add_metrics(self, **values: Any) -> None:
        """Add values that do not belong to one step to the next line of metrics."""
        self._extra |= values

    def drop_metrics(self, *names: str) -> None:
        """Take back what was added to the next line and holds no longer."""
        for name in names:
            self._extra.pop(name, None)

    def note_changes(self, changed: Mapping[str, list[str]] | None) -> None:
        """Add what this start's first step changes of the recipe of the step before to the line of that step."""
        if changed:
            self._changed = dict(changed)
            self.add_metrics(changed=self._changed)

    def log_eval(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Log the results of an evaluation of `step`."""
        self.add_metrics(**numbers)
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})
        if self._board is not None:
            self._board.log({"step": step, **numbers})
        for name, path in pictures.items():
            self.log_image(name, path, step)

    def log_late_eval(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log a background measurement of an earlier step, on its own line."""
        line = {"step": step, **numbers}
        if self._file is not None:
            self._file.write(line)
            self._file.sync()
        if self._wandb is not None:
            self._wandb.late(line)
        if self._board is not None:
            self._board.log(line)

    @staticmethod
    def late_steps_of(run: RunFolder) -> set[int]:
        """Steps logged by `log_late_eval` in any start; reads all of metrics.jsonl."""
        return set(read_late(run.metrics))

    def log_image(self, name: str, path: Path, step: int) -> None:
        if self._wandb is not None:
            self._wandb.picture(name, path, step)
        if self._board is not None:
            self._board.picture(name, path, step)

    def sync(self) -> None:
        """Sync the files, so that they survive a power failure."""
        if self._file is not None:
            self._file.sync()
        if self._samples is not None:
            self._samples.sync()
        if self._board is not None:
            self._board.sync()

    def rewind(self, step: int) -> None:
        """Remove the steps after `step`."""
        if self._changed and step <= self._began:
            self.add_metrics(changed=self._changed)
        if self._file is not None:
            self._file.close()
            self._file = MetricsFile(self._run.metrics, step, self._guard)
            self._alarms = self._watch()
        if self._samples is not None:
            self._samples.rewind(step)
        if self._board is not None:
            self._board.rewind(step)

    def close(self) -> None:
        self._progress.close()
        if self._file is not None:
            self._file.close()
        if self._samples is not None:
            self._samples.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()

    def _watch(self) -> SpikeAlarms | None:
        alarms = self._recipe.train.alarms
        if alarms is None:
            return None
        return SpikeAlarms(alarms.window, alarms.deviations, steps_before(self._run.metrics, 2 * alarms.window))

    def _mfu(self, samples_per_second: float) -> float | None:
        if self._flops is None:
            return None
        peak = Device.current().peak_flops
        return None if peak is None else samples_per_second * self._flops / (peak * self._world.size)
