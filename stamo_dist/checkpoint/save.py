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
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import get_state_dict

from stamo_dist.checkpoint.compatibility import RunFingerprint
from stamo_dist.checkpoint.dcp_writer import DcpWriter, Layout
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
from stamo_dist.checkpoint.writers import CheckpointWriter, ZeroWriter
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
    results: list[Any] = field(default_factory=list)
    error: str | None = None
    bug: str | None = None  # traceback of an error other than I/O


class _Writing:
    """A save between staging and commit."""

    def __init__(self, state: RunState, kind: str, writers: list[CheckpointWriter], folder: Path):
        self.state, self.kind, self.writers, self.folder = copy.deepcopy(state), kind, writers, folder
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
            for writer in self.writers:
                self.written.results.append(writer.write(self.folder, self.written.files))
        except OSError as e:
            self.written.error = _reason(e)
        except Exception:
            self.written.bug = traceback.format_exc()


@dataclass(frozen=True)
class Origin:
    """The provenance of a checkpoint's weights for its manifest.

    `precision`: the recipe's train.precision; `git_commit`: of the code; `sources`: recipe field → location of its
    weights.
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
        self._staging = Staging()
        self._layouts: dict[str, Layout] = defaultdict(Layout)
        self._whole: list[Checkpoint] | None = None  # newest first; listed once, by rank 0
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

        With `wait`, or without train.checkpoint.async, it blocks until the checkpoint is complete; else until the state
        is copied to host memory, and `poll` finishes the save.

        Raises:
            FencedError: A newer start of this run writes here now.
        """
        ended = self.poll(wait=True)
        if wait and ended and ended[-1].step == state.step and ended[-1].error is None:
            return ended
        staged = self._policy.background and not wait
        began = time.perf_counter()
        folder = part_of(self._checkpoints, state.step, self._number)
        self._writing = _Writing(state, kind, self._writers(staged=staged), folder)
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

    def _writers(self, *, staged: bool) -> list[CheckpointWriter]:
        engine = self._engine
        writers: list[CheckpointWriter] = []
        staging = self._staging if staged else None
        self._staging.begin()
        if engine.is_zero:
            writers.append(ZeroWriter(engine, staging))
        else:
            module, optimizer = get_state_dict(engine.unwrapped, engine.inner_optimizer)
            state = {"module": module, "optimizer": optimizer}
            writers.append(DcpWriter("dcp", state, staging, self._layouts["dcp"]))
        if self._ema is not None:
            writers.append(DcpWriter("ema", {"ema": self._ema.pieces()}, staging, self._layouts["ema"]))
        return writers

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
        if outcome is not None:
            self._layouts.clear()  # rank 0 may not have received what the others wrote
        elif written is not None:
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
        for i, writer in enumerate(writing.writers):
            writer.finish(folder, files, [w.results[i] for w in written])
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
