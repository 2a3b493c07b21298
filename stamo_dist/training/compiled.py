"""Code that torch.compile made, kept beside the run: a later start, on whatever node, does not make it again."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from stamo_dist.data.loader import Batch
from stamo_dist.run.own import seal, unseal
from stamo_dist.run.state import RunState
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.training.trainer import Hook, StepResult


class CompiledHook(Hook):
    """Takes code from `file` before this start's first step, and writes there after it what it had to make.

    Compiled code names the number of its GPU, so there is a file for each. PyTorch finds an entry by a hash of the
    graph, its shapes, versions and hardware: what does not fit is compiled, as without a file. For a CPU the file holds
    graphs and C++, which is built again. A file from elsewhere is not run: it is sealed with a key of this user's.

    Args:
        file: Of this process's GPU.
        writes: Whether this process is the one that writes it.
    """

    def __init__(self, file: Path, logger: RunLogger, *, writes: bool):
        self._file, self._logger, self._writes = file, logger, writes
        self._first = True

    def before_step(self, state: RunState, batch: Batch) -> None:
        if self._first and self._file.is_file():
            self._take()

    def after_step(self, state: RunState, result: StepResult) -> None:
        if not self._first:
            return
        self._first = False
        from torch._dynamo.utils import counters

        found, made = (counters["inductor"][f"fxgraph_cache_{word}"] for word in ("hit", "miss"))
        self._logger.info(f"torch.compile: {found} graphs were there, {made} were compiled")
        if self._writes and (made or not self._file.is_file()):
            self._write()

    def _take(self) -> None:
        """What this user's runs wrote alone: it is code, and is run."""
        try:
            code = unseal(self._file.read_bytes())
        except OSError as e:
            self._logger.info(f"{self._file}: cannot be read ({e.strerror}), compiling anew")
            return
        if code is None:
            self._logger.info(f"{self._file}: was not written by a run of yours, and is not run; compiling anew")
        elif torch.compiler.load_cache_artifacts(code) is None:
            self._logger.info(f"{self._file}: cannot be read, compiling anew")

    def _write(self) -> None:
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            self._logger.info("torch.compile left nothing to keep for the next start")
            return
        tmp = self._file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._file.parent.mkdir(exist_ok=True)
            tmp.write_bytes(seal(saved[0]))
            tmp.replace(self._file)
        except OSError as e:
            self._logger.info(f"{self._file}: not written ({e.strerror}); the next start compiles again")
