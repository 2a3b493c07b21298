"""Which runs there are says each user's registry, so that `stamo status` finds them from anywhere.

It is a folder of symbolic links, one a run. Adding one needs no lock, and a run that was deleted is a dead link.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path


def registry() -> Path:
    """The folder of links to this user's runs."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "stamo" / "runs"


def register(run: str | Path) -> None:
    """Add a run to the registry; a home that cannot be written only means that it is not found by itself."""
    path = Path(run).absolute()
    with contextlib.suppress(OSError, RuntimeError):
        link = registry() / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
