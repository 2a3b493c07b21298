"""Profiling during training: a trace of a few steps, a memory snapshot, and host-device synchronisations."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import profile

from stamo_dist.data.loader import Batch
from stamo_dist.device import Device
from stamo_dist.recipe.training import ProfileSettings
from stamo_dist.run.state import RunState
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.training.trainer import Hook, StepResult


class ProfileHook(Hook):
    """Rank 0: traces steps `start` + 1 to `start` + `steps` for Perfetto or chrome://tracing.

    A start of the run that begins after them traces nothing.
    """

    def __init__(self, wanted: ProfileSettings, folder: Path, logger: RunLogger, device: Device):
        self._wanted, self._folder, self._logger = wanted, folder, logger
        self._device = device
        self._memory = wanted.memory and device.is_gpu
        self._profiler: profile | None = None

    def on_start(self, state: RunState) -> None:
        if self._profiler is not None:  # it traced steps that a rollback has undone
            self._profiler.stop()
            self._profiler = None
            if self._memory:
                self._device.record_memory(on=False)

    def before_step(self, state: RunState, batch: Batch) -> None:
        if state.step != self._wanted.start:
            return
        if self._memory:
            self._device.record_memory(on=True)
        self._profiler = profile(
            activities=self._device.activities, record_shapes=True, profile_memory=self._wanted.memory
        )
        self._profiler.start()

    def after_step(self, state: RunState, result: StepResult) -> None:
        if self._profiler is None or state.step < self._wanted.start + self._wanted.steps:
            return
        self._device.synchronize()
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        trace = self._folder / f"step_{self._wanted.start + 1:08d}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            if self._memory:
                self._device.dump_memory(trace.with_name(f"memory_{self._wanted.start + 1:08d}.pickle"))
        except OSError as e:
            self._logger.info(f"{trace}: not written ({e.strerror})")
        else:
            self._logger.info(f"traced {self._wanted.steps} steps: {trace}; open it at ui.perfetto.dev")
        finally:
            if self._memory:
                self._device.record_memory(on=False)


class SyncGuardHook(Hook):
    """Makes PyTorch warn about or forbid host-device synchronisation in the steps after a start's first.

    Free to wait are the loop's one wait, for the gradient's norm, and what is between steps: saving, evaluating.
    """

    def __init__(self, mode: str, device: Device):
        self._mode, self._device = mode, device
        self._warm = False

    def on_start(self, state: RunState) -> None:
        self._warm = False
        self._device.watch_waits("default")

    def before_step(self, state: RunState, batch: Batch) -> None:
        if self._warm:
            self._device.watch_waits(self._mode)

    def after_step(self, state: RunState, result: StepResult) -> None:
        self._warm = True
        self._device.watch_waits("default")
