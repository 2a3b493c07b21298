"""What was submitted and what became of it: `RUN/launch/`, read and written by everything that looks after a run.

::

    launch/launch.json     what was asked for; replaced as a whole
    launch/events.jsonl    what happened, one line an event, oldest first
    launch/snapshots/      the code and the recipe that every start of the run uses
    logs/main.log          what the job and rank 0 print, over all starts
    logs/rank_00003.log    what rank 3 prints, over all starts
    logs/task_3.log        in place of both, task 3 of an array that shares one command out
"""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from stamo_dist.errors import RunError
from stamo_dist.launch.known import remember
from stamo_dist.run.folder import write_atomic

VERSION = 1
Kind = Literal["run", "array", "stage", "beside"]  # beside: of a run that trains, and no run of its own
_ENDS = ("failed", "stopped", "cancelled")
What = Literal["submitted", "started", "preempted", "requeued", "finished", "failed", "cancelled", "stopped"]


def folder(run: str | Path) -> Path:
    return Path(run) / "launch"


def main_log(run: str | Path) -> Path:
    return Path(run) / "logs" / "main.log"


def rank_log(run: str | Path, rank: int) -> Path:
    """The log of one rank; rank 0 prints into the main log."""
    return Path(run) / "logs" / f"rank_{rank:05d}.log" if rank else main_log(run)


def task_log(run: str | Path, task: int | str) -> Path:
    """The log of one task of an array that shares one command out."""
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
    command: list[str] = field(default_factory=list)  # arguments of `stamo` that each process runs
    after: list[str] = field(default_factory=list)  # run folders that have to finish first
    tasks: int = 1  # of the job array that shares the command out
    pipeline: str | None = None  # the folder of the pipeline that it is a stage of
    digest: str = ""  # of what the stage does: another one has to run again
    cluster: str = "local"  # name of the profile
    profile: dict[str, Any] = field(default_factory=dict)  # every value it resolved to
    nodes: int = 1
    processes_per_node: int = 1
    node_counts: list[int] = field(default_factory=list)  # with which it runs; just `nodes` when empty
    snapshot: str | None = None  # the folder that the job's code and recipe come from
    max_restarts: int = 3  # without progress
    job_ids: list[str] = field(default_factory=list)  # newest last
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
            remember(self.run_dir)


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl."""

    event: What
    job: str | None = None
    restart: int = 0  # how often the scheduler has started the job again
    nodes: list[str] = field(default_factory=list)
    world_size: int | None = None
    step: int | None = None  # of the newest whole checkpoint
    reason: str = ""
    time: str = field(default_factory=now)


def read(run: str | Path) -> Launch:
    """The launch of the run at `run`.

    Raises:
        RunError: There is none, or it was written by a newer version.
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
    return Launch(**_known(Launch, found))


def record(run: str | Path, event: Event) -> None:
    """Append one event. One write of less than a page, so lines of several processes do not mix."""
    where = folder(run)
    where.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": event.time, **asdict(event)}).encode() + b"\n"
    fd = os.open(where / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)


def events(run: str | Path) -> list[Event]:
    """Everything that happened so far, oldest first; torn lines are left out."""
    try:
        text = (folder(run) / "events.jsonl").read_text()
    except OSError:
        return []
    return list(_events(text))


def since_submitted(history: list[Event]) -> list[Event]:
    """What happened since the run was submitted last."""
    begins = [i for i, event in enumerate(history) if event.event == "submitted"]
    return history[begins[-1] :] if begins else history


def finished(launch: Launch) -> str | None:
    """When the launch, all tasks of its array, had finished; None if it has not."""
    ends = {e.job: e.time for e in since_submitted(events(launch.run_dir)) if e.event == "finished"}
    return max(ends.values()) if len(ends) >= launch.tasks else None


def hindrance(launch: Launch) -> str:
    """Which of the runs that have to finish first did not, and what became of it; "" if all did."""
    for before in map(read, launch.after):
        if finished(before) is None:
            last = next((e for e in reversed(since_submitted(events(before.run_dir))) if e.event in _ENDS), None)
            if last is None or last.event == "stopped":  # because of another one
                return hindrance(before) or f"{before.name} did not finish"
            return f"{before.name} {last.event}"
    return ""


def _events(text: str) -> Iterator[Event]:
    for line in text.splitlines():
        try:
            yield Event(**_known(Event, json.loads(line)))
        except (ValueError, TypeError, AttributeError):
            continue


def _known(kind: type, found: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {name: value for name, value in found.items() if name in names}
