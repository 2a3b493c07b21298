"""The progress of a run read from its folder, without torch and the scheduler."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from stamo_dist.faults.heartbeats import heartbeat_of_main
from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.history import TooLongError, backwards, parsed
from stamo_dist.run.lease import LeaseEnd, Owner, last_start
from stamo_dist.run.success import KEY, Successes, is_late
from stamo_dist.tracking.alarms import alarm_text
from stamo_dist.words import duration

_STEP = re.compile(r"step_(\d+)")
_WINDOW = 50  # number of logged steps for the speed
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SECTIONS = re.compile(r"^(?:name|train):.*\n?(?:(?:[ \t].*)?\n)*", re.MULTILINE)  # those that are read of a recipe
#: A section's own line, and how far its values are indented.
_HEAD = re.compile(r"(\w+:[ \t]*(?:#.*)?\n)(?:[ \t]*(?:#.*)?\n)*([ \t]+)")
_VALUES = r"^{0}(?:steps|global_batch):.*\n?(?:{0}[ \t]+.*\n?)*"


class Window:
    """The last logged steps. Lines are parsed when they are asked for: a table of many runs needs two of each."""

    def __init__(self, lines: list[bytes] | None = None):
        self._lines = lines or []  # oldest first

    @classmethod
    def of(cls, metrics: Path) -> Window:
        with suppress(OSError, TooLongError), metrics.open("rb") as f:
            steps = (line for _, line in backwards(f) if line.rstrip().endswith(b"}") and not _is_late(line))
            return cls(list(islice(steps, _WINDOW))[::-1])
        return cls()

    @cached_property
    def last(self) -> dict[str, Any]:
        return next(_objects(reversed(self._lines)), {})

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        return list(_objects(self._lines))

    @property
    def mean_loss(self) -> float | None:
        losses = [value for line in self.lines if (value := _loss(line)) is not None]
        return sum(losses) / len(losses) if losses else None

    @property
    def alarm(self) -> str:
        """The last spike."""
        return next((alarm_text(line) for line in reversed(self.lines) if line.get("alarms")), "")

    @property
    def step_seconds(self) -> float | None:
        timed = (line for line in _objects(self._lines) if "step" in line and "seconds" in line)
        first = next(timed, None)
        last = next((line for line in _objects(reversed(self._lines)) if "step" in line and "seconds" in line), None)
        if first is None or last is None or last["step"] <= first["step"]:
            return None
        return max(1e-9, (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))


@dataclass(frozen=True)
class Progress:
    """The progress of a run; unknown values are None."""

    name: str = ""
    steps: int | None = None  # in all
    step: int = 0  # last logged step
    loss: float | None = None
    rate: float | None = None  # samples per second, over the last steps
    step_seconds: float | None = None
    written: float | None = None  # timestamp of the last line of metrics
    checkpoint: int | None = None  # step of the newest complete checkpoint
    saved: float | None = None  # timestamp of that checkpoint
    owner: Owner | None = None  # process that trains here, or did last
    silence: float | None = None  # seconds since the owner's last heartbeat
    end: LeaseEnd | None = None  # why the last start ended, if not as it should
    exported: bool = False  # whether training finished and the model was exported
    phase: str = ""  # rank 0's activity outside steps, such as "building" or "exporting", and its seconds
    terms: dict[str, float] = field(default_factory=dict)  # the last line of metrics
    window: Window = field(default_factory=Window)
    successes: Successes = field(default_factory=Successes)  # a policy's success in closed loop

    @property
    def finished(self) -> bool:
        return self.exported and self.steps is not None and (self.checkpoint or 0) >= self.steps

    @property
    def unsaved(self) -> str:
        """That the newest save failed; "" if none did."""
        step = self.terms.get("save_failed")
        return "" if step is None else f"STEP {step:.0f} COULD NOT BE SAVED, it tries again; `stamo logs` says why"

    @property
    def eta(self) -> float | None:
        """Seconds of training left."""
        if self.steps is None or self.step_seconds is None:
            return None
        return max(0, self.steps - self.step) * self.step_seconds


def read_progress(run: Path, recipe: Path | None = None) -> Progress:
    """Read a run's folder.

    Args:
        run: The folder; it may be empty or missing.
        recipe: The resolved recipe, for a run that has not started and so has no `resolved.yaml`.
    """
    resolved = _sections(run / "resolved.yaml") or (_sections(recipe) if recipe else {})
    train = resolved.get("train") or {}
    window = Window.of(run / "metrics.jsonl")
    last, step_seconds = window.last, window.step_seconds
    batch = None
    if "global_batch" in train:
        batch = BatchSizes.of(train["global_batch"]).at(max(0, last.get("step", 1) - 1))
    rate = batch / step_seconds if batch and step_seconds else last.get("samples_per_second")
    checkpoint, saved = newest_checkpoint(run / "checkpoints")
    start = last_start(run)
    terms = {k: v for k, v in last.items() if isinstance(v, (int, float))}
    return Progress(
        name=str(resolved.get("name") or run.name),
        steps=train.get("steps"),
        step=last.get("step") or checkpoint or 0,
        loss=_loss(last),
        rate=rate,
        step_seconds=step_seconds,
        written=_when(run / "metrics.jsonl"),
        checkpoint=checkpoint,
        saved=saved,
        owner=start.owner,
        silence=start.silence,
        end=start.end,
        exported=_exported(run, checkpoint),
        phase=_phase(run),
        terms=terms,
        window=window,
        successes=Successes.read(run),
    )


def newest_checkpoint(checkpoints: Path) -> tuple[int | None, float | None]:
    """(step, timestamp) of the newest complete checkpoint; only names and manifest files are checked."""
    found = list[tuple[int, str]]()
    with suppress(OSError):
        found = [(int(match[1]), match[0]) for name in os.listdir(checkpoints) if (match := _STEP.fullmatch(name))]
    for step, name in sorted(found, reverse=True):
        if (when := _when(checkpoints / name / "checkpoint.json")) is not None:
            return step, when
    return None, None


def age(stamp: float | None) -> float | None:
    return None if stamp is None else max(0.0, time.time() - stamp)


def _exported(run: Path, checkpoint: int | None) -> bool:
    """Whether the model of the newest checkpoint is exported; runs of earlier versions do not name its step."""
    step = RunFolder(run).exported_step
    return (run / "model").is_dir() and (step is None or step >= (checkpoint or 0))


def _phase(run: Path) -> str:
    """The phase in rank 0's heartbeat, which the watchdog writes and removes at the end of a start."""
    main = heartbeat_of_main(run / "logs")
    return f"{main.phase} for {duration(main.seconds)}" if main is not None and main.phase else ""


def _loss(line: dict[str, Any]) -> float | None:
    """The task's loss, which is the first value after the step."""
    values = [v for k, v in line.items() if k != "step"]
    return values[0] if values and isinstance(values[0], (int, float)) else None


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    return (found for line in lines if (found := parsed(line)) is not None)


def _is_late(line: bytes) -> bool:
    return KEY.encode() in line and is_late(parsed(line) or {})


def _when(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _sections(recipe: Path) -> dict[str, Any]:
    """`name`, and what is needed of `train`, of a resolved recipe: parsing all would take most of a table's time."""
    try:
        sections = _SECTIONS.findall(recipe.read_text())
        found = yaml.load("".join(map(_needed, sections)), Loader=_Loader)
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _needed(section: str) -> str:
    """Of a section in lines of its own, only the wanted values."""
    head = _HEAD.match(section)
    return head[1] + "".join(re.findall(_VALUES.format(head[2]), section, re.MULTILINE)) if head else section
