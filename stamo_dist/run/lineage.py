"""Where a run's weights come from: `parent.json`, and what that makes of several runs. Free of torch and numpy."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from stamo_dist.run.folder import write_atomic

_log = logging.getLogger(__name__)
PARENT = "parent.json"

Kind = Literal["init", "branch", "resume"]
Weights = Literal["averaged", "raw"]
SAID: Mapping[Kind, str] = {
    "init": "began with the weights of",
    "branch": "branched off",
    "resume": "went on from",
}


@dataclass(frozen=True)
class Parent:
    """What a run began from.

    Attributes:
        kind: `init`: weights alone (init_from); `branch`: the state, with another schedule; `resume`: the state.
        run: Path of the parent's folder, or a hub id.
        step: Of the parent; None where it is not known, as for a model of another program.
        weights: Which of the parent's were taken; None for the whole state.
    """

    kind: Kind
    run: str
    step: int | None = None
    weights: Weights | None = None

    def __str__(self) -> str:
        of = "" if self.step is None else f", step {self.step}"
        return f"{self.run}{of}" + (f", {self.weights} weights" if self.weights else "")


def write(run_folder: Path, parent: Parent) -> None:
    """Record a run's parent, in place of one recorded before."""
    write_atomic(run_folder / PARENT, json.dumps(asdict(parent), indent=1) + "\n")


def record(run_folder: Path, parent: Parent | None) -> None:
    """As `write`; None removes what an earlier start recorded, of which nothing was kept."""
    if parent is None:
        (run_folder / PARENT).unlink(missing_ok=True)
    else:
        write(run_folder, parent)


def resumed(checkpoint: Path, step: int) -> Parent:
    """The parent of a run that goes on from a checkpoint: its run, or the checkpoint's folder if it is alone."""
    at = checkpoint.resolve()
    return Parent("resume", str(at.parents[1] if at.parent.name == "checkpoints" else at), step)


def read(run_folder: Path) -> Parent | None:
    """The recorded parent; None where there is none, or where the file cannot be read, which the log says."""
    path = run_folder / PARENT
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        parent = Parent(raw["kind"], raw["run"], raw.get("step"), raw.get("weights"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        _log.warning("%s: cannot be read (%s), so the run's parent is not known", path, type(e).__name__)
        return None
    known = parent.kind in get_args(Kind) and parent.weights in (*get_args(Weights), None)
    step_fits = parent.step is None or type(parent.step) is int
    if not (known and step_fits and isinstance(parent.run, str)):
        _log.warning("%s: is not what stamo writes, so the run's parent is not known", path)
        return None
    return parent


def ancestors(run_folder: Path) -> Iterator[Parent]:
    """A run's parent, that one's parent and so on, as far as the folders are there; each once."""
    seen, at = {str(run_folder.resolve())}, run_folder
    while (parent := read(at)) is not None:
        yield parent
        if parent.run in seen:
            return
        seen.add(parent.run)
        at = Path(parent.run)


def children(run_folder: Path) -> list[tuple[Path, Parent]]:
    """The runs beside it, in the same folder, that began from it."""
    own = str(run_folder.resolve())
    try:
        beside = sorted(path for path in run_folder.resolve().parent.iterdir() if (path / PARENT).is_file())
    except OSError:
        return []
    return [(path, parent) for path in beside if (parent := read(path)) is not None and parent.run == own]


def lines(run_folder: Path) -> list[str]:
    """Where a run comes from, nearest first, and what began from it among the runs beside it; for people."""
    said, who = list[str](), "it"
    for parent in ancestors(run_folder):
        gone = "" if Path(parent.run).is_dir() or not Path(parent.run).is_absolute() else " (moved or removed)"
        said.append(f"{who} {SAID[parent.kind]} {parent}{gone}")
        who = f"that run, {Path(parent.run).name},"
    return said + [
        f"{path.name} {SAID[parent.kind]} it" + (f" at step {parent.step}" if parent.step is not None else "")
        for path, parent in children(run_folder)
    ]
