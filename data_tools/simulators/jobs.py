"""Progress of each task of a simulation, on disk and in this call."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py

from data_tools.simulators import demo_file, maniskill_file
from stamo_dist.errors import DataError

PARTS = ".parts"
#: A task is given up when this many attempts, and nine tenths of all, have failed.
HOPELESS = 20


@dataclass(frozen=True)
class AttemptOutcome:
    """The result of one attempt, reported by the worker and stored in PARTS/TASK/ATTEMPT.json."""

    attempt: int
    success: bool
    frames: int
    attributes: dict[str, Any]


@dataclass
class TaskJob:
    """One task's file and its progress."""

    task: str
    path: Path
    parts: Path
    options: dict[str, Any]
    episodes: int
    outcomes: dict[int, bool] = field(default_factory=dict)  # attempt → success, from earlier calls and this one
    fresh: list[AttemptOutcome] = field(default_factory=list)  # of this call
    attributes: dict[str, Any] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    kept: int = 0  # attempts recorded in the existing file

    @classmethod
    def open(cls, task: str, out: Path, options: dict[str, Any], episodes: int) -> TaskJob:
        """Load the results of earlier calls.

        Raises:
            DataError: The file was made with other options or is broken, or the folder cannot be written.
        """
        # The folder of parts is named by the options, so another size or seed does not use these parts.
        key = hashlib.sha256(json.dumps({**options, "task": task}, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{task}.h5" if options["benchmark"] == "maniskill" else f"{task}_demo.hdf5"
        job = cls(task, out / name, out / PARTS / key, options, episodes)
        if job.path.exists():
            try:
                with h5py.File(job.path, "r") as file:
                    data = job.root(file)
                    stored = json.loads(data.attrs["simulate_options"])
                    attempts = int(data.attrs["attempts"])
                    good = {int(demo.attrs["attempt"]) for demo in data.values()}
                    job.attributes = {k: v for k, v in data.attrs.items() if k != "attempts"}
            except (OSError, KeyError, ValueError) as e:
                raise DataError(f"{job.path}: not a file that `stamo data simulate` wrote ({e}); remove it") from e
            if stored != options:
                other = [k for k in options if stored.get(k) != options[k]]
                asked = ", ".join(f"{k} {stored.get(k)} (asked: {options[k]})" for k in other)
                raise DataError(f"{job.path}: made with {asked}; choose another OUT or remove the file")
            job.outcomes = {k: k in good for k in range(attempts)}
            job.kept = attempts
        try:
            job.path.parent.mkdir(parents=True, exist_ok=True)
            if not job.written:
                job.parts.mkdir(parents=True, exist_ok=True)
                for report in job.parts.glob("*.json"):
                    outcome = AttemptOutcome(**json.loads(report.read_text()))
                    job.outcomes[outcome.attempt] = outcome.success
                    job.attributes.update(outcome.attributes)
        except OSError as e:
            raise DataError(f"{out}: cannot be written: {e.strerror}") from e
        return job

    def root(self, file: h5py.File) -> h5py.Group:
        """The group that holds the episodes."""
        return file if self.options["benchmark"] == "maniskill" else file["data"]

    @property
    def missing(self) -> int:
        """Successful episodes still to come."""
        return max(0, self.episodes - sum(self.outcomes.values()))

    @property
    def written(self) -> bool:
        """Whether the file holds the requested episodes."""
        return self.kept > 0 and self.complete and len(self.outcomes) == self.kept

    @property
    def complete(self) -> bool:
        """Whether the first `episodes` successes are known."""
        return not self.running and self.next_attempt() is None

    def next_attempt(self) -> int | None:
        """The first attempt not yet started, or None if running and finished attempts may suffice.

        Running attempts count as successes, so no attempt is made that the file will not need.
        """
        hoped = attempt = 0
        while hoped < self.episodes:
            if attempt not in self.running and attempt not in self.outcomes:
                return attempt
            hoped += self.outcomes.get(attempt, True)
            attempt += 1
        return None

    def finished(self, outcome: AttemptOutcome) -> None:
        self.running.discard(outcome.attempt)
        self.outcomes[outcome.attempt] = outcome.success
        self.fresh.append(outcome)
        self.attributes.update(outcome.attributes)
        failed = len(self.outcomes) - sum(self.outcomes.values())
        if failed >= max(HOPELESS, 0.9 * len(self.outcomes)):
            raise DataError(
                f"{self.task}: the scripted expert failed {failed} of {len(self.outcomes)} attempts; "
                "choose another task"
            )

    def write(self) -> None:
        """Assemble the file from the parts and remove them."""
        needed = max(self.episodes, sum(self.outcomes[k] for k in range(self.kept)))
        attempts = chosen = 0
        while chosen < needed:
            chosen += self.outcomes[attempts]
            attempts += 1
        with contextlib.ExitStack() as stack:
            old = self.root(stack.enter_context(h5py.File(self.path, "r"))) if self.kept else {}
            parts: dict[int, Any] = {int(demo.attrs["attempt"]): demo for demo in old.values()}
            for attempt in range(self.kept, attempts):
                if self.outcomes[attempt]:
                    parts[attempt] = self.parts / f"{attempt:05d}.hdf5"
            extra = {"simulate_options": json.dumps(self.options), "attempts": attempts}
            layout = maniskill_file if self.options["benchmark"] == "maniskill" else demo_file
            layout.assemble(self.path, parts, {**self.attributes, **extra})
        self.kept = attempts
        self.outcomes = {k: v for k, v in self.outcomes.items() if k < attempts}
        shutil.rmtree(self.parts, ignore_errors=True)


def open_jobs(tasks: Sequence[str], out: Path, options: dict[str, Any], episodes: int) -> list[TaskJob]:
    jobs, problems = [], []
    for task in tasks:
        try:
            jobs.append(TaskJob.open(task, out, options, episodes))
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))
    return jobs
