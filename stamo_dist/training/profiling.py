"""Profiling during training: a trace of a few steps, a memory snapshot, and host-device synchronisations."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from stamo_dist.data.loader import Batch
from stamo_dist.recipe.training import ProfileSettings
from stamo_dist.run.state import RunState
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.training.trainer import Hook, StepResult

_ALLOCATIONS = 200_000  # that a snapshot keeps


class ProfileHook(Hook):
    """Rank 0: traces steps `start` + 1 to `start` + `steps` for Perfetto or chrome://tracing.

    A start of the run that begins after them traces nothing.
    """

    def __init__(self, wanted: ProfileSettings, folder: Path, logger: RunLogger, device: torch.device):
        self._wanted, self._folder, self._logger = wanted, folder, logger
        self._on_gpu = device.type == "cuda"
        self._profiler: profile | None = None

    def on_start(self, state: RunState) -> None:
        self._profiler = None  # trace of steps undone by a rollback

    def before_step(self, state: RunState, batch: Batch) -> None:
        if state.step != self._wanted.start:
            return
        if self._wanted.memory and self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=self._wanted.memory)
        self._profiler.start()

    def after_step(self, state: RunState, result: StepResult) -> None:
        if self._profiler is None or state.step < self._wanted.start + self._wanted.steps:
            return
        if self._on_gpu:
            torch.cuda.synchronize()
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        trace = self._folder / f"step_{self._wanted.start + 1:08d}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            if self._wanted.memory and self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(trace.with_name(f"memory_{self._wanted.start + 1:08d}.pickle")))
        except OSError as e:
            self._logger.info(f"{trace}: not written ({e.strerror})")
        else:
            self._logger.info(f"traced {self._wanted.steps} steps: {trace}; open it at ui.perfetto.dev")
        finally:
            if self._wanted.memory and self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)


class SyncGuardHook(Hook):
    """Makes PyTorch warn about or forbid host-device synchronisation, from a start's second step on.

    Exempt are the loop's own waits: the logger's for the previous step's metrics, and clipping's for the gradient norm.
    """

    def __init__(self, mode: str):
        self._mode = mode

    def on_start(self, state: RunState) -> None:
        self._set("default")

    def after_step(self, state: RunState, result: StepResult) -> None:
        self._set(self._mode)

    def _set(self, mode: str) -> None:
        torch.cuda.set_sync_debug_mode(mode)
