"""The run folder: everything one run writes, under one path.

::

    recipe.yaml      the recipe as written          resolved.yaml   every value it resolved to
    metrics.jsonl    one line a logged step         env.json        versions, machine, command
    starts.jsonl     one line a start               .leases/        which start may write
    checkpoints/     step_00000123/                 model/          the final export, of the step in exported.json
    logs/            rank_00000.log                 first_batch.png
    profile/         step_00000011.json.gz, a trace of a few steps (train.profile); memory_00000011.pickle
    samples.jsonl    what each step read (train.log_samples)
    compiled/        gpu_00.bin, what torch.compile made (train.compile), for the next start
    parent.json      what the run began from, if that is another run or a model (run/lineage.py)
    success.json     a policy's success while it trains: the last and the best

Beside metrics.jsonl and samples.jsonl there may be files with their damaged lines (`.damaged`), foreign files found in
their place (`.foreign`) and, during truncation, lines to keep (`.kept`).
"""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stamo_dist.errors import RunError
from stamo_dist.run.code import code_hash, code_version, git_commit, versions
from stamo_dist.run.registry import register

_PACKAGES = (
    "stamo-dist",
    "torch",
    "accelerate",
    "deepspeed",
    "diffusers",
    "transformers",
    "mosaicml-streaming",
    "numpy",
)

_OF_THE_KERNEL = (("proc",), ("sys",))


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` in one step, so that a reader never sees a half-written file."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with tmp.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    tmp.replace(path)


def append_line(path: Path, line: str) -> None:
    """Add a line in one write, of less than a page, so that lines of several processes do not mix.

    A torn last line is terminated first, so that only that line is lost.

    Raises:
        OSError: It could not be written whole.
    """
    with path.open("ab+", buffering=0) as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        data = b"\n" * (f.read(1) not in (b"", b"\n")) + line.encode() + b"\n"
        if f.write(data) != len(data):  # a disk that becomes full takes a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def exported(self) -> Path:
        return self.path / "exported.json"

    @property
    def exported_step(self) -> int | None:
        """The step of the weights in `model`, None without a complete export."""
        try:
            return int(json.loads(self.exported.read_text())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def compiled(self) -> Path:
        return self.path / "compiled"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def bad_batches(self) -> Path:
        return self.path / "bad_batches.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def success(self) -> Path:
        return self.path / "success.json"

    def check(self) -> None:
        """Check that the folder can be made and written, without creating anything.

        Raises:
            RunError: It cannot be.
        """
        try:
            there = next(p for p in (self.path, *self.path.parents) if p.exists())
            if not there.is_dir():
                why = f"{there} is no folder"
            elif there.resolve().parts[1:2] in _OF_THE_KERNEL:  # root seems to be allowed to write there
                why = f"{there} is the kernel's, and holds no files"
            elif not os.access(there, os.W_OK | os.X_OK):
                why = f"{there} cannot be written"
            else:
                return
        except OSError as e:
            why = str(e.strerror)
        raise RunError(f"run_dir: {self.path}: {why}; choose another with --set run_dir=…")

    def prepare(self) -> None:
        """Create the folder and check that it can be written.

        Raises:
            RunError: It cannot be.
        """
        try:
            for d in (self.path, self.checkpoints, self.logs):
                d.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-test-{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as e:
            raise RunError(
                f"run_dir: {self.path} cannot be written ({e.strerror}); choose another with --set run_dir=…"
            ) from e

    def describe(
        self,
        text: str,
        resolved: str,
        command: list[str],
        *,
        step: int,
        processes: int,
        sources: Mapping[str, str],
        changed: Mapping[str, list[str]] | None = None,
    ) -> None:
        """Write the run's description (recipe, versions, machine, command, this start), and register the run.

        `sources`: recipe field → location of its weights. `changed`: recipe field → its value in the last start, and
        in this one.
        """
        about = {**environment(command), "weights": dict(sources)}
        start = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "after step": step}
        start |= {"processes": processes, "host": about["host"], "commit": code_version()}
        start |= {"changed": dict(changed)} if changed else {}
        write_atomic(self.recipe, text)
        write_atomic(self.path / "env.json", json.dumps(about, indent=2) + "\n")
        append_line(self.path / "starts.jsonl", json.dumps(start))
        write_atomic(self.resolved, resolved)  # last: a start killed before it says the change again
        register(self.path)


def open_run(path: str | Path) -> RunFolder:
    """The run at `path`.

    Raises:
        RunError: `path` is not a run folder.
    """
    run = RunFolder(Path(path))
    if not run.resolved.is_file():
        raise RunError(f"{path}: not a run folder (no resolved.yaml in it); give the run_dir of a `stamo train`")
    return run


def environment(command: list[str]) -> dict[str, Any]:
    """Versions, machine and command of this process; no environment variables, which may hold secrets."""
    from stamo_dist.device import Device

    return {
        "command": command,
        "cwd": os.getcwd(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "gpus": Device.current().all_names,
        "packages": versions(_PACKAGES),
        "git_commit": git_commit(),
        "code": code_hash(),
    }
