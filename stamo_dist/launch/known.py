"""Which runs there are: each user's list of run folders, so that `stamo status` finds them from anywhere.

The list is a folder of symbolic links, one a run: adding one needs no lock, and a run that was deleted is a dead link.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

#: In a pipeline's folder: its name, and stage → run folder.
PIPELINE = "pipeline.json"
#: Below a recipe's run folder: the runs of its sweeps.
SWEEP = "sweep"
_SIGNS = ("launch/launch.json", "resolved.yaml")  # of a run folder


def shelf() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "stamo" / "runs"


def remember(run: str | Path) -> None:
    """Add a run to the list; a home that cannot be written only means that it is not found by itself."""
    path = Path(run).absolute()
    link = shelf() / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    with contextlib.suppress(OSError, RuntimeError):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def known() -> list[Path]:
    """The remembered runs that are still there; dead links go."""
    found = []
    with contextlib.suppress(OSError, RuntimeError):
        for link in shelf().iterdir():
            with contextlib.suppress(OSError):
                target = Path(os.readlink(link))
                if is_run(target):
                    found.append(target)
                elif target.parent.is_dir():  # not so where a file system is not mounted
                    link.unlink()
    return sorted(found)


def below(folders: Iterable[Path]) -> list[Path]:
    """The run folders among and directly below `folders`; of a pipeline's folder its stages, in order."""
    found = []
    for folder in folders:
        candidates = _stages(folder) or [folder]
        if candidates == [folder] and not is_run(folder):
            with contextlib.suppress(OSError):
                candidates = sorted(p for p in folder.iterdir() if p.is_dir())
        found += [path.absolute() for path in candidates if is_run(path)]
    return found


def _stages(folder: Path) -> list[Path]:
    try:
        return [Path(run) for run in json.loads((folder / PIPELINE).read_text())["stages"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def is_run(path: Path) -> bool:
    return any((path / sign).is_file() for sign in _SIGNS)
