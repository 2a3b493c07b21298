"""Handling steps with non-finite loss or gradient, and rolling back after many in a row.

Every strategy computes the norm of the whole gradient, over all ranks, before its optimizer steps; a non-finite norm
skips the update on all ranks, so no further communication is needed (`Engine.backward`). A skipped step changes
neither the learning rate nor the moving average.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stamo_dist.checkpoint.load import load_checkpoint
from stamo_dist.checkpoint.manifest import Checkpoint
from stamo_dist.checkpoint.retention import scan
from stamo_dist.checkpoint.select import ResumePoint, verify_or_fall_back
from stamo_dist.data.loader import Cursor
from stamo_dist.data.mixture import Mixture
from stamo_dist.distributed.collectives import on_main
from stamo_dist.distributed.engine import Engine
from stamo_dist.errors import RunError
from stamo_dist.optim.ema import EMA
from stamo_dist.recipe.data import Data
from stamo_dist.recipe.training import Train
from stamo_dist.run.folder import RunFolder, write_atomic
from stamo_dist.run.state import RunState


def check_skipped(state: RunState, sources: Sequence[str], data: Data) -> None:
    """Raises:
    RunError: More samples of a source were unreadable than the recipe allows.
    """
    for source, skipped, seen in zip(sources, state.skipped, state.samples, strict=True):
        if data.max_bad_samples is not None and skipped > data.max_bad_samples:
            raise RunError(
                f"data.sources.{source}: {skipped} of {seen} samples could not be read, more than data.max_bad_samples "
                f"({data.max_bad_samples}); the log names them: repair its shards, or raise data.max_bad_samples"
            )


def roll_back(
    run: RunFolder,
    mixture: Mixture,
    engine: Engine,
    ema: EMA | None,
    state: RunState,
    train: Train,
    guard: Callable[[], None],
) -> tuple[RunState, list[str]]:
    """Load the last checkpoint before the bad steps, and skip all batches read since; every process calls it.

    A run that is killed meanwhile repeats it. `guard` raises, on rank 0, if this start may no longer write.
    Returns the new run state and notes for the user.

    Raises:
        RunError: It was rolled back before, there is no checkpoint to return to, or no data left.
        FencedError: A newer start of this run writes here now.
    """
    batches = BadBatches(run.bad_batches, mixture)

    def choose(damaged: frozenset[Path]) -> ResumePoint:
        guard()
        whole = [checkpoint for checkpoint in scan(run.checkpoints).whole if checkpoint.path not in damaged]
        return ResumePoint(batches.last_good(whole, state, train.steps))

    checkpoint, notes = verify_or_fall_back(run.checkpoints, engine.world, choose)
    assert checkpoint is not None, "last_good found one"

    def record() -> None:
        guard()
        batches.record(checkpoint.manifest.state.step, state)

    # After renaming newer checkpoints, which the next start must not find.
    on_main(engine.world, record)
    precision, sources = train.precision, mixture.sources
    back = load_checkpoint(checkpoint, engine, ema, precision=precision, sources=sources, say=notes.append)
    notes.append(
        f"no finite loss and gradient in {state.bad_in_a_row} steps in a row: went back to {checkpoint.path}; "
        f"going on without the batches since, see {batches.path}"
    )
    return replace(back, cursor=state.cursor), notes


@dataclass(frozen=True)
class BadBatches:
    """`bad_batches.jsonl`: the global batches that a run skips since a rollback, one per line."""

    path: Path
    mixture: Mixture

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in lines if self._is_of_this_mixture(line)]

    def _is_of_this_mixture(self, line: dict[str, Any]) -> bool:
        """Whether the mixture has the batch still: a change of weights or batch size after it leaves it as it was."""
        if line["fingerprint"] == self.mixture.fingerprint:
            return True
        if self.mixture.steps is not None and line["batch"] >= self.mixture.steps:
            return False
        return bool(self.mixture.plan(line["batch"], 1).samples[0].tolist() == line["samples"])

    def after(self, cursor: dict[str, Any]) -> dict[str, Any]:
        """The position to read from, given the run's position."""
        passed = {line["batch"] for line in self._lines()}
        sizes = self.mixture.batches
        batch = sizes.batches(Cursor.from_dict(cursor).samples)
        while batch in passed:
            batch += 1
        return Cursor(sizes.before(batch)).to_dict()

    def last_good(self, whole: Sequence[Checkpoint], state: RunState, steps: int) -> Checkpoint:
        """The checkpoint to return to from `state`; `whole`: the complete ones, newest first.

        Raises:
            RunError: The run was rolled back before, there is nothing to go back to, or no data to go on with.
        """
        first = state.step - state.bad_in_a_row + 1
        why = f"loss or gradient was not finite in steps {first} to {state.step} (train.max_bad_steps)"
        if self._lines():
            raise RunError(
                f"{why}, after the run was rolled back for it once ({self.path}); lower optimizer.lr or "
                "optimizer.clip, or continue an earlier checkpoint in another run_dir with --resume PATH"
            )
        good = (c for c in whole if c.manifest.state.step < first and not c.manifest.state.bad_in_a_row)
        found = next(good, None)
        if found is None:
            raise RunError(f"{why}, and there is no checkpoint from before; lower optimizer.lr or optimizer.clip")
        end, left = self.mixture.steps, steps - found.manifest.state.step
        if end is not None and self.mixture.batches.batches(Cursor.from_dict(state.cursor).samples) + left > end:
            raise RunError(f"{why}, and data.sources.*.max_epochs leaves no other batches to go on with")
        return found

    def record(self, back: int, state: RunState) -> None:
        """Record all batches read after step `back`, up to `state`."""
        last = self.mixture.batches.batches(Cursor.from_dict(state.cursor).samples)
        begin = last - (state.step - back)
        lines = [
            {
                "batch": batch,
                "step": state.step - (last - batch) + 1,
                "finite": batch < last - state.bad_in_a_row,
                "samples": self.mixture.plan(batch, 1).samples[0].tolist(),
                "fingerprint": self.mixture.fingerprint,
            }
            for batch in range(begin, last)
        ]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))
