"""Records of submitted runs and their events in `RUN/launch/`, used by all commands that manage runs.

::

    launch/launch.json     the request; replaced as a whole
    launch/events.jsonl    one line per event, oldest first
    launch/snapshots/20260101-120000/  the code and the recipe that every start uses: editing the checkout changes none
        code/              the packages, and run.py, which starts a module of them
        recipe.yaml        every value, with where it came from
        written.yaml       the recipe as written
        git.diff           uncommitted changes
    logs/main.log          what the job and rank 0 print, over all starts
    logs/rank_00003.log    what rank 3 prints, over all starts
    logs/task_3.log        in place of both, task 3 of an array that shares one command out
"""

from __future__ import annotations

import contextlib
import errno
import functools
import getpass
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stamo_dist import shipped
from stamo_dist.errors import RunError
from stamo_dist.run.code import COMMIT_FILE, git_commit, git_diff
from stamo_dist.run.folder import append_line, write_atomic
from stamo_dist.run.history import last_objects
from stamo_dist.run.registry import register, registry

if TYPE_CHECKING:
    from stamo_dist.recipe.load import Loaded

VERSION = 1
Kind = Literal["run", "array", "stage", "beside"]  # "beside": runs beside a training, not a run of its own
FAILING_NODE_HOURS = 12.0  # for which a node is left out, where the profile does not say
_ENDS = ("failed", "stopped", "cancelled")
What = Literal[
    "submitted", "started", "exporting", "preempted", "requeued", "finished", "failed", "cancelled", "stopped"
]
#: In a pipeline's folder: its name, and stage → run folder.
PIPELINE = "pipeline.json"
#: Below a recipe's run folder: the runs of its sweeps.
SWEEP = "sweep"
_SIGNS = ("launch/launch.json", "resolved.yaml")  # of a run folder
_RUN = '''\
"""Start a module of the packages beside this file: python run.py MODULE ARGUMENTS."""

import runpy
import sys

module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
'''


def folder(run: str | Path) -> Path:
    return Path(run) / "launch"


def main_log(run: str | Path) -> Path:
    return Path(run) / "logs" / "main.log"


def rank_log(run: str | Path, rank: int) -> Path:
    """The log of one rank; rank 0 prints into the main log."""
    return Path(run) / "logs" / f"rank_{rank:05d}.log" if rank else main_log(run)


def task_log(run: str | Path, task: int | str) -> Path:
    """The log of one task of an array that divides one command."""
    return Path(run) / "logs" / f"task_{task}.log"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass
class Launch:
    """launch.json: one run, or one stage of a pipeline, as it was submitted."""

    name: str
    run_dir: str  # absolute
    recipe: str  # as given on the command line
    overrides: list[str] = field(default_factory=list)
    kind: Kind = "run"
    command: list[str] = field(default_factory=list)  # `stamo` arguments of each process
    after: list[str] = field(default_factory=list)  # run folders that must finish first
    tasks: int = 1  # tasks of the job array that divides the command
    pipeline: str | None = None  # folder of the pipeline it belongs to
    digest: str = ""  # digest of the stage's work: if it changes, the stage runs again
    cluster: str = "local"  # name of the profile
    profile: dict[str, Any] = field(default_factory=dict)  # every value it resolved to
    nodes: int = 1
    processes_per_node: int = 1
    node_counts: list[int] = field(default_factory=list)  # node counts on which it can run; just `nodes` if empty
    snapshot: str | None = None  # folder of the job's code and recipe
    max_restarts: int = 3  # without progress
    job_ids: list[str] = field(default_factory=list)  # newest last
    cwd: str = field(default_factory=os.getcwd)  # of the submission
    user: str = field(default_factory=getpass.getuser)
    submitted_at: str = field(default_factory=now)
    version: int = VERSION

    @property
    def job(self) -> str | None:
        """The newest job."""
        return self.job_ids[-1] if self.job_ids else None

    def write(self) -> None:
        where = folder(self.run_dir)
        where.mkdir(parents=True, exist_ok=True)
        write_atomic(where / "launch.json", json.dumps(asdict(self), indent=1) + "\n")
        if self.kind != "beside":
            register(self.run_dir)


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl."""

    event: What
    job: str | None = None
    restart: int = 0  # number of restarts of the job by the scheduler
    nodes: list[str] = field(default_factory=list)
    world_size: int | None = None
    step: int | None = None  # step of the newest complete checkpoint
    reason: str = ""
    blamed: list[str] = field(default_factory=list)  # nodes on which the start failed or hung
    cause: str = ""  # the error there
    avoids: list[str] = field(default_factory=list)  # failing nodes that the start to come is kept off
    time: str = field(default_factory=now)


def read(run: str | Path) -> Launch:
    """The launch of the run at `run`.

    Raises:
        RunError: It is missing, or was written by a newer version.
    """
    file = folder(run) / "launch.json"
    try:
        found = json.loads(file.read_text())
        version = found["version"]
    except OSError:
        raise RunError(
            f"{run}: was not submitted (no {file.relative_to(run)}); `stamo submit RECIPE` does it"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{file}: is damaged; `stamo submit RECIPE` writes it again") from None
    if version > VERSION:
        raise RunError(f"{file}: was written by a newer stamo (format {version}); use that one")
    return Launch(**_fields_of(Launch, found))


def record(run: str | Path, event: Event) -> None:
    """Append one event.

    Raises:
        OSError: It cannot be written.
    """
    where = folder(run)
    where.mkdir(parents=True, exist_ok=True)
    append_line(where / "events.jsonl", json.dumps({"time": event.time, **asdict(event)}))


def unwritable(run: str | Path) -> str:
    """Why nothing can be written into the run folder, and the way out; "" if something can."""
    probe = folder(run) / f".write-test-{os.getpid()}"
    try:
        probe.write_bytes(bytes(4096))
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{run} cannot be written ({e.strerror}); {'make room' if full else 'make it writable'}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return ""


def newest_first(run: str | Path) -> Iterator[Event]:
    """All events, newest first; torn lines are skipped."""
    for found in last_objects(folder(run) / "events.jsonl", within=None):
        try:
            event = Event(**found)
        except TypeError:  # of another version
            try:
                event = Event(**_fields_of(Event, found))
            except TypeError:
                continue
        yield event


def events(run: str | Path) -> list[Event]:
    """All events, oldest first."""
    return list(newest_first(run))[::-1]


def since_submitted(run: str | Path) -> list[Event]:
    """The events since the last submission, oldest first."""
    found: list[Event] = []
    for event in newest_first(run):
        found.append(event)
        if event.event == "submitted":
            break
    return found[::-1]


def finished(launch: Launch) -> str | None:
    """When the launch (all tasks of its array) finished; None if it has not."""
    ends = {e.job: e.time for e in since_submitted(launch.run_dir) if e.event == "finished"}
    return max(ends.values()) if len(ends) >= launch.tasks else None


def hindrance(launch: Launch) -> str:
    """A required earlier run that did not finish, and its state; "" if all finished."""
    for before in map(read, launch.after):
        if finished(before) is None:
            last = next((e for e in reversed(since_submitted(before.run_dir)) if e.event in _ENDS), None)
            if last is None or last.event == "stopped":  # because of another one
                return hindrance(before) or f"{before.name} did not finish"
            return f"{before.name} {last.event}"
    return ""


def _fields_of(kind: type, found: dict[str, Any]) -> dict[str, Any]:
    names = _names(kind)
    return {name: value for name, value in found.items() if name in names}


@functools.cache
def _names(kind: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(kind))


def registered() -> list[Path]:
    """The registered runs that still exist; dead links are removed."""
    found = []
    with contextlib.suppress(OSError, RuntimeError):
        for link in registry().iterdir():
            with contextlib.suppress(OSError):
                target = Path(os.readlink(link))
                if is_run(target):
                    found.append(target)
                elif target.parent.is_dir():  # not if a file system is not mounted
                    link.unlink()
    return sorted(found)


def below(folders: Iterable[Path]) -> list[Path]:
    """The run folders among and directly below `folders`; for a pipeline's folder its stages, in order."""
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


def take_snapshot(run: str | Path, loaded: Loaded | None) -> Path:
    """Copy the packages and the recipe (if there is one) into the run folder; returns the snapshot.

    Raises:
        RunError: The run folder cannot be written.
    """
    from stamo_dist.recipe.render import render  # ranks import this file, without it

    snapshot = folder(run) / "snapshots" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    try:
        unneeded = shutil.ignore_patterns("__pycache__", shipped.FOLDER)
        for package, place in shipped.PACKAGES.items():
            shutil.copytree(place, snapshot / "code" / package, ignore=unneeded)
        (snapshot / "code" / "run.py").write_text(_RUN)
        (snapshot / "code" / COMMIT_FILE).write_text(git_commit() or "")
        if diff := git_diff():
            (snapshot / "git.diff").write_bytes(diff)
        if loaded is not None:
            recipe_file(snapshot).write_text("".join(f"{line.plain}\n" for line in render(loaded)), encoding="utf-8")
            (snapshot / "written.yaml").write_text(loaded.text, encoding="utf-8")
    except OSError as e:
        raise RunError(f"run_dir: {run} cannot be written ({e.strerror}); choose another with --set run_dir=…") from e
    return snapshot


def recipe_file(snapshot: str | Path) -> Path:
    return Path(snapshot) / "recipe.yaml"


def snapshot_command(snapshot: str | Path, module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a module of the snapshot's code, from any working directory."""
    return [sys.executable, str(Path(snapshot) / "code" / "run.py"), module, *arguments]


def process_command(launch: Launch) -> list[str]:
    """The command of each process of a launch on this machine: from its snapshot, or from this package without one."""
    if launch.snapshot is None:
        return [sys.executable, "-m", "stamo_dist.cli", *launch.command]
    return snapshot_command(launch.snapshot, "stamo_dist.cli", launch.command)
