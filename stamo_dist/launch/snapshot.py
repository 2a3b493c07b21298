"""The code and the recipe of a submitted run, copied beside it: editing the checkout changes no queued run.

::

    launch/snapshots/20260101-120000/code/        the packages, and run.py, which starts a module of them
    launch/snapshots/20260101-120000/recipe.yaml  every value, with where it came from
    launch/snapshots/20260101-120000/written.yaml the recipe as written
    launch/snapshots/20260101-120000/git.diff     what was not committed
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from stamo_dist.errors import RunError
from stamo_dist.launch.record import Launch, folder
from stamo_dist.recipe.load import Loaded
from stamo_dist.recipe.render import render
from stamo_dist.run.folder import COMMIT_FILE, git_commit

_PACKAGES = ("stamo_dist", "data_tools")
_RUN = '''\
"""Start a module of the packages beside this file: python run.py MODULE ARGUMENTS."""

import runpy
import sys

module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
'''


def take(run: str | Path, loaded: Loaded | None) -> Path:
    """Copy the packages and the recipe (if there is one) into the run folder; returns the snapshot.

    Raises:
        RunError: The run folder cannot be written.
    """
    root = Path(__file__).resolve().parents[2]
    snapshot = folder(run) / "snapshots" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    try:
        for package in _PACKAGES:
            shutil.copytree(root / package, snapshot / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
        (snapshot / "code" / "run.py").write_text(_RUN)
        (snapshot / "code" / COMMIT_FILE).write_text(git_commit() or "")
        if diff := _diff(root):
            (snapshot / "git.diff").write_bytes(diff)
        if loaded is not None:
            recipe_file(snapshot).write_text("".join(f"{line.plain}\n" for line in render(loaded)), encoding="utf-8")
            (snapshot / "written.yaml").write_text(loaded.text, encoding="utf-8")
    except OSError as e:
        raise RunError(f"run_dir: {run} cannot be written ({e.strerror}); choose another with --set run_dir=…") from e
    return snapshot


def recipe_file(snapshot: str | Path) -> Path:
    return Path(snapshot) / "recipe.yaml"


def command(snapshot: str | Path, module: str, arguments: Sequence[str], python: str | None = None) -> list[str]:
    """The command that runs a module of the snapshot's code, wherever it is started."""
    return [python or sys.executable, str(Path(snapshot) / "code" / "run.py"), module, *arguments]


def process(launch: Launch) -> list[str]:
    """The command of each process of a launch on this machine: of its snapshot, or of this package without one."""
    if launch.snapshot is None:
        return [sys.executable, "-m", "stamo_dist.cli", *launch.command]
    return command(launch.snapshot, "stamo_dist.cli", launch.command)


def _diff(root: Path) -> bytes:
    try:
        return subprocess.run(
            ["git", "diff", "HEAD"], cwd=root, capture_output=True, check=True, timeout=30
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return b""
