"""How one process writes its part of a checkpoint, in three phases.

*Plan* needs all processes and runs in the training thread; *write* writes this process's own files, needs no other
process and may run during the next steps; *finish* writes rank 0's index of all files. So a full disk on one process
never leaves the others waiting in a collective.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from stamo_dist.checkpoint import sink
from stamo_dist.checkpoint.manifest import Stored
from stamo_dist.checkpoint.staging import Staging
from stamo_dist.distributed.engine import ZERO_STAGE, Engine

ZERO_TAG = "zero"


class CheckpointWriter(Protocol):
    """One group of files of a checkpoint."""

    def write(self, folder: Path, files: dict[str, Stored]) -> Any:
        """Write and sync this process's files under `folder` and record them; returns the input for `finish`.

        Raises:
            OSError: A file could not be written.
        """

    def finish(self, folder: Path, files: dict[str, Stored], written: list[Any]) -> None:
        """Rank 0: write the index from the values returned by every rank's `write`."""


class _Catch:
    """Replaces DeepSpeed's checkpoint engine: collects the states to save without writing them."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.caught: list[tuple[str, Any]] = []  # path, state

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.caught.append((path, state_dict))

    def commit(self, info: Any) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:  # other methods that DeepSpeed calls
        return getattr(self._engine, name)


class ZeroWriter:
    """DeepSpeed's files of this process, collected instead of written by DeepSpeed.

    Under zero1 and zero2, rank 0's file of the whole module holds only the names of trained weights: every rank
    writes its share of the fp32 copies.
    """

    def __init__(self, engine: Engine, staging: Staging | None):
        module = engine.deepspeed
        own = module.checkpoint_engine
        module.checkpoint_engine = catch = _Catch(own)
        module._copy_recovery_script = lambda folder: None  # DeepSpeed writes this file without its checkpoint engine
        try:
            module.save_checkpoint(".", tag=ZERO_TAG, save_latest=False)
        finally:
            module.checkpoint_engine = own
            del module._copy_recovery_script
        shared = ZERO_STAGE[engine.strategy] == 3
        states = [(path, state if shared else _without_trained(state, engine)) for path, state in catch.caught]
        self._states = [(path, staging.copy_all(state) if staging else state) for path, state in states]
        if staging and engine.device.type == "cuda":
            torch.cuda.synchronize()

    def write(self, folder: Path, files: dict[str, Stored]) -> None:
        for path, state in self._states:
            name = str(Path(path))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = sink.save(state, folder / name)

    def finish(self, folder: Path, files: dict[str, Stored], written: list[Any]) -> None:
        pass


def _without_trained(state: dict[str, Any], engine: Engine) -> dict[str, Any]:
    if "module" not in state:
        return state
    trained = {n for n, p in engine.unwrapped.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {**state, "module": {n: t.new_empty(0) if n in trained else t for n, t in state["module"].items()}}
