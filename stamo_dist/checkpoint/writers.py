"""What one process writes into a checkpoint, in three acts.

*Plan* needs all processes and happens in the training thread; *write* is this process's own files, needs nobody and
may run beside the next steps; *finish* is rank 0's index over what all wrote. So a full disk on one process never
leaves the others waiting in a collective.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from stamo_dist.checkpoint import sink
from stamo_dist.checkpoint.manifest import Stored
from stamo_dist.checkpoint.staging import Staging
from stamo_dist.distributed.engine import ZERO_STAGE, Engine

ZERO_TAG = "zero"


class CheckpointWriter(Protocol):
    """One group of files of a checkpoint."""

    def write(self, folder: Path, files: dict[str, Stored]) -> Any:
        """Write and sync this process's files under `folder` and record them; returns what `finish` needs.

        Raises:
            OSError: They could not be written.
        """

    def finish(self, folder: Path, files: dict[str, Stored], written: list[Any]) -> None:
        """Rank 0: write the index from what every rank's `write` returned."""


class _Catch:
    """In place of DeepSpeed's checkpoint engine: keeps what it is given to save, and writes nothing."""

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

    def __getattr__(self, name: str) -> Any:  # what it is asked for besides
        return getattr(self._engine, name)


class ZeroWriter:
    """DeepSpeed's own files of this process, caught on their way to the disk.

    Under zero1 and zero2 rank 0's file of the whole module holds no trained weights, but only their names: every rank
    writes its share of the fp32 copies.
    """

    def __init__(self, engine: Engine, staging: Staging | None):
        module = engine.deepspeed
        own = module.checkpoint_engine
        module.checkpoint_engine = catch = _Catch(own)
        module._copy_recovery_script = lambda folder: None  # it writes past the checkpoint engine
        try:
            module.save_checkpoint(".", tag=ZERO_TAG, save_latest=False)
        finally:
            module.checkpoint_engine = own
            del module._copy_recovery_script
        shared = ZERO_STAGE[engine.strategy] == 3
        states = [(path, state if shared else _without_trained(state, engine)) for path, state in catch.caught]
        self._states = [(path, staging.copy_all(state) if staging else state) for path, state in states]
        if staging:
            staging.wait()

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
