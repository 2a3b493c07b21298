"""A submission that is refused leaves the run folder as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stamo_dist.errors import RunError
from stamo_dist.launch.record import folder
from stamo_dist.run.folder import write_atomic


@contextlib.contextmanager
def nothing_left(run: Path) -> Iterator[None]:
    """Undo written files if the block fails, also where the disk has become full.

    Raises:
        RunError: The block raised OSError: the folder cannot be written.
    """
    made = next((p for p in [*reversed(run.parents), run] if not p.exists()), None)
    record_file, log = folder(run) / "launch.json", folder(run) / "events.jsonl"
    snapshots = set((folder(run) / "snapshots").glob("*"))
    before = record_file.read_text() if record_file.is_file() else None
    size = log.stat().st_size if log.is_file() else None
    try:
        yield
    except BaseException as e:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        else:
            for taken in set((folder(run) / "snapshots").glob("*")) - snapshots:
                shutil.rmtree(taken, ignore_errors=True)
            with contextlib.suppress(OSError):  # nothing was written where nothing can be
                log.unlink() if size is None else os.truncate(log, size)
            with contextlib.suppress(OSError):
                if before is None:
                    record_file.unlink(missing_ok=True)
                elif record_file.read_text() != before:
                    write_atomic(record_file, before)
        if isinstance(e, OSError):
            raise RunError(f"run_dir: {run} cannot be written ({e.strerror}); make room, or make it writable") from e
        raise
