"""Writing checkpoints: atomically over all processes, in the background if requested, and without failing the training.

A save that fails, because the disk is full or the file system unavailable, leaves nothing behind, is reported by every
process alike, and is retried a little later. Only a newer start of the same run ends this one.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stamo_dist.checkpoint.compatibility import RunFingerprint
from stamo_dist.checkpoint.manifest import (
    MANIFEST,
    Checkpoint,
    CheckpointManifest,
    Stored,
    read_checkpoint_manifest,
)
from stamo_dist.checkpoint.retention import (
    discard,
    folder_of,
    leftovers,
    part_of,
    scan,
    set_aside,
    superseded,
    sync,
    sync_tree,
)
from stamo_dist.checkpoint.staging import Staging
from stamo_dist.checkpoint.state_writer import Layout, StateWriter
from stamo_dist.device import Device
from stamo_dist.distributed import ranges
from stamo_dist.distributed.collectives import broadcast, everywhere, gather
from stamo_dist.distributed.engine import Engine
from stamo_dist.errors import CheckpointError, StamoError
from stamo_dist.optim.ema import EMA
from stamo_dist.recipe.training import CheckpointConfig
from stamo_dist.run.lease import RunLease
from stamo_dist.run.state import RunState
from stamo_dist.run.success import Successes


@dataclass(frozen=True)
class Saved:
    """The result of one save, the same on every process."""

    step: int
    path: Path
    error: str | None  # why it failed; then nothing of it remains on disk
    seconds: float  # seconds until it was complete
    stall: float  # of these, seconds in which training was blocked
    beside: bool  # whether it was written in the background

    def __str__(self) -> str:
        if self.error is not None:
            return f"STEP {self.step} COULD NOT BE SAVED: {self.error}; the earlier checkpoints are kept"
        stall = f", of which training waited {self.stall:.1f} s" if self.beside else ""
        return f"saved {self.path} in {self.seconds:.1f} s{stall}"

    def facts(self) -> dict[str, Any]:
        """Values for the metrics."""
        if self.error is not None:
            return {"save_failed": self.step}
        return {"save_seconds": round(self.seconds, 3), "save_stall": round(self.stall, 3)}


@dataclass
class Written:
    """This process's part of a save."""

    files: dict[str, Stored] = field(default_factory=dict)
    error: str | None = None
    bug: str | None = None  # traceback of an error other than I/O


class _Writing:
    """A save between staging and commit."""

    def __init__(self, state: RunState, kind: str, writer: StateWriter, folder: Path):
        self.state, self.kind, self.writer, self.folder = copy.deepcopy(state), kind, writer, folder
        self.began = time.perf_counter()
        self.stall = 0.0
        self.written = Written()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write in a background thread; only for staged state, as a thread has its own current CUDA device."""
        self._thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    @property
    def beside(self) -> bool:
        return self._thread is not None

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def write(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writer.write(self.folder, self.written.files)
        except OSError as e:
            self.written.error = _reason(e)
        except Exception:
            self.written.bug = traceback.format_exc()


@dataclass(frozen=True)
class Origin:
    """The provenance of a checkpoint's weights for its manifest.

    `precision`: the recipe's train.precision; `git_commit`: of the code, or its version and hash; `sources`: recipe
    field → location of its weights.
    """

    fingerprint: RunFingerprint
    precision: str
    git_commit: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


class Saver:
    """Saves the running engine; every process makes one and calls the same methods at the same steps.

    Args:
        checkpoints: The run's folder of checkpoints.
        engine, ema: The state to save.
        policy: The recipe's train.checkpoint.
        origin: Provenance for the manifest.
        lease: Rank 0: this start's lease, which must be the newest at commit; None if nobody else can write.
        needed: Rank 0: steps whose checkpoints are kept in addition to the policy's and the best by success.
    """

    def __init__(
        self,
        checkpoints: Path,
        engine: Engine,
        ema: EMA | None,
        policy: CheckpointConfig,
        origin: Origin,
        *,
        lease: RunLease | None = None,
        needed: Callable[[], Collection[int]] = tuple,
    ):
        self._checkpoints, self._engine, self._ema, self._policy = checkpoints, engine, ema, policy
        self._origin, self._lease, self._needed = origin, lease, needed
        self._number = broadcast(lease.number if lease else 0)
        self._writing: _Writing | None = None
        self._staging = Staging(Device.current())
        self._layout = Layout()
        self._whole: list[Checkpoint] | None = None  # newest first; rank 0 looks once
        self._removing: threading.Thread | None = None
        self._retry: int | None = None  # the step at which a failed save is retried
        self._delay = 1

    def due(self, step: int, *, last: bool = False) -> str | None:
        """Which kind of save is due after `step`: regular, temporary or none."""
        policy = self._policy
        often = (policy.every, policy.keep_every)
        if last or any(n and step % n == 0 for n in often) or (self._retry is not None and step >= self._retry):
            return "regular"
        return "temporary" if policy.ephemeral_every and step % policy.ephemeral_every == 0 else None

    def save(self, state: RunState, kind: str, *, wait: bool) -> list[Saved]:
        """Save `state` as `kind`. Returns the saves that finished: an earlier one, and this one if it was waited for.

        With `wait`, or without train.checkpoint.background, training stands still until the checkpoint is whole; else
        until it is copied to host memory, and `poll` ends it.

        Raises:
            FencedError: A newer start of this run writes here now.
        """
        ended = self.poll(wait=True)
        if wait and ended and ended[-1].step == state.step and ended[-1].error is None:
            return ended
        staged = self._policy.background and not wait
        began = time.perf_counter()
        folder = part_of(self._checkpoints, state.step, self._number)
        self._writing = _Writing(state, kind, self._writer(staged=staged), folder)
        self._writing.began = began
        if staged:
            self._writing.start()
        else:
            self._writing.write()
        self._writing.stall = time.perf_counter() - began
        return ended if staged else ended + self.poll(wait=True)

    def poll(self, *, wait: bool = False) -> list[Saved]:
        """Finish the save in progress, once every process has written its part.

        Raises:
            FencedError: A newer start of this run writes here now.
        """
        if self._writing is None:
            return []
        began = time.perf_counter()
        if wait:
            self._writing.join()
        elif not everywhere(self._writing.done):
            return []
        writing, self._writing = self._writing, None
        outcome = self._commit(writing)
        if isinstance(outcome, StamoError):
            raise outcome
        if outcome is None:
            self._retry, self._delay = None, 1
        else:
            self._retry = writing.state.step + self._delay
            self._delay = min(2 * self._delay, self._policy.every)
        now = time.perf_counter()
        final = folder_of(self._checkpoints, writing.state.step)
        seconds, stall = now - writing.began, writing.stall + now - began
        return [Saved(writing.state.step, final, outcome, seconds, stall, writing.beside)]

    def _writer(self, *, staged: bool) -> StateWriter:
        engine = self._engine
        self._staging.begin()
        mine = ranges.own([*ranges.trained_ranges(engine), *ranges.other_ranges(engine)])
        average = self._ema.held() if self._ema is not None else ()
        shapes, steps = ranges.shapes(engine.unwrapped), ranges.steps(engine)
        staging = self._staging if staged else None
        return StateWriter(engine.world, [*mine, *average], shapes, steps, staging, self._layout)

    def _commit(self, writing: _Writing) -> str | StamoError | None:
        """Agree on the result: None if complete, else the reason, or the exception that ends the run."""
        written = gather(writing.written)
        outcome: str | StamoError | None = None
        bug: str | None = None
        if written is not None:
            bug = next((w.bug for w in written if w.bug), None)
            outcome = bug or next((f"rank {i}: {w.error}" for i, w in enumerate(written) if w.error), None)
            if outcome is None:
                try:
                    self._publish(writing, written)
                except OSError as e:
                    outcome = _reason(e)
                except StamoError as e:
                    outcome = e
            if outcome is not None:
                shutil.rmtree(writing.folder, ignore_errors=True)
        outcome, bug = broadcast((outcome, bug))
        if bug:
            raise RuntimeError(f"step {writing.state.step} could not be saved:\n{bug}")
        if outcome is None and written is not None:
            self.prune()
        return outcome

    def prune(self) -> None:
        """Rank 0: start removing checkpoints that are no longer needed; `close` waits for it."""
        self.close()
        best = Successes.read(self._checkpoints.parent).best
        needed = {*self._needed(), *([best.step] if best else [])}
        if self._whole is None:
            self._whole = scan(self._checkpoints).whole
        self._whole = [checkpoint for checkpoint in self._whole if (checkpoint.path / MANIFEST).exists()]
        doomed = superseded(self._whole, self._policy, needed) + leftovers(self._checkpoints, self._number)
        discarded = [new for path in doomed if (new := discard(path, self._number))]

        def work() -> None:
            for path in discarded:
                shutil.rmtree(path, ignore_errors=True)

        self._removing = threading.Thread(target=work, name="remover", daemon=True)
        self._removing.start()

    def close(self) -> None:
        """Rank 0: wait for removals to finish; what remains is removed when the run starts again."""
        if self._removing is not None:
            self._removing.join()

    def _publish(self, writing: _Writing, written: list[Written]) -> None:
        """Rank 0: write the index, sync, rename, and finally write the manifest."""
        folder, state = writing.folder, writing.state
        files = {name: stored for w in written for name, stored in w.files.items()}
        writing.writer.finish(folder, files)
        sync_tree(folder)
        final = folder_of(self._checkpoints, state.step)
        self._guard()
        if final.exists():
            _clear(final)
        folder.rename(final)
        origin = self._origin
        manifest = CheckpointManifest(
            state=state,
            strategy=self._engine.strategy,
            world_size=self._engine.world.size,
            precision=origin.precision,
            fingerprint=origin.fingerprint.mixture,
            files=files,
            recipe=dict(origin.fingerprint.fields),
            kind=writing.kind,
            averaged=self._ema is not None,
            lease=self._number,
            git_commit=origin.git_commit,
            sources=dict(origin.sources),
        )
        part_file = final / f".{MANIFEST}.tmp"
        try:
            part_file.write_text(manifest.text())
            sync(part_file)
            self._guard()
            part_file.rename(final / MANIFEST)
        except OSError:
            shutil.rmtree(final, ignore_errors=True)
            raise
        sync(final)
        sync(self._checkpoints)
        if self._whole is not None:
            self._whole = [Checkpoint(final, manifest), *(c for c in self._whole if c.path != final)]

    def _guard(self) -> None:
        if self._lease is not None:
            self._lease.check()


def _clear(final: Path) -> None:
    """Make room for a checkpoint of the same step: remove a leftover, rename a complete one."""
    try:
        read_checkpoint_manifest(final)
    except CheckpointError:
        shutil.rmtree(final)
    else:
        set_aside(final, "abandoned")


def _reason(e: OSError) -> str:
    return f"{e.strerror or e}{f' ({e.filename})' if e.filename else ''}" if e.errno is not None else str(e)
