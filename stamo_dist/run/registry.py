"""Each user's registry of runs, so that `stamo status` finds them from anywhere.

It is a folder with one symbolic link per run. Adding one needs no lock, and a deleted run leaves a dead link.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def registry() -> Path:
    """The folder of links to this user's runs."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "stamo" / "runs"


def run_names(incomplete: str) -> Iterable[str]:
    """The names of registered run folders that begin so, for a shell's completion."""
    with contextlib.suppress(OSError, RuntimeError):
        paths = {Path(os.readlink(link)) for link in registry().iterdir()}
        return sorted({path.name for path in paths if path.name.startswith(incomplete) and path.is_dir()})
    return []


def register(run: str | Path) -> None:
    """Add a run to the registry; if the home folder is not writable, the run is just not found automatically."""
    path = Path(run).absolute()
    with contextlib.suppress(OSError, RuntimeError):
        link = registry() / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
