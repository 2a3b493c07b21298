"""The kinds of faults, their order, and injecting them."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from stamo_dist.chaos.starts import Tree

RANK, RANKS, LAUNCHER, WORKER, CHECKPOINT = (
    "a rank",
    "all ranks",
    "the launcher",
    "a loader worker",
    "newest checkpoint",
)
STARTING, TRAINING, SAVING, LEAVING, BETWEEN = "starting", "training", "saving", "leaving", "between starts"
QUEUED = "queued again"
PAUSE = "1 s pause"
FLIPPED, TRUNCATED, MISSING = "flipped byte", "truncated file", "missing file"

Kind = tuple[str, str, str]  # whom, what, moment
KINDS: tuple[Kind, ...] = (
    (RANK, "SIGKILL", TRAINING), (RANK, "SIGKILL", TRAINING), (RANK, "SIGKILL", SAVING), (RANK, "SIGKILL", SAVING),
    (RANK, "SIGKILL", STARTING), (RANK, "SIGKILL", LEAVING), (RANK, "SIGTERM", TRAINING), (RANK, "SIGTERM", SAVING),
    (RANK, "SIGINT", TRAINING), (RANK, "SIGUSR1", TRAINING), (RANK, "SIGUSR2", STARTING), (RANK, "SIGSEGV", TRAINING),
    (RANK, "SIGSTOP", TRAINING), (RANK, PAUSE, TRAINING),
    (RANKS, "SIGKILL", TRAINING), (RANKS, "SIGKILL", SAVING), (RANKS, "SIGKILL", LEAVING), (RANKS, "SIGKILL", STARTING),
    (RANKS, "SIGTERM", TRAINING),
    (LAUNCHER, "SIGKILL", TRAINING), (LAUNCHER, "SIGKILL", SAVING), (LAUNCHER, "SIGTERM", TRAINING),
    (LAUNCHER, "SIGINT", TRAINING), (LAUNCHER, "SIGUSR1", STARTING),
    (WORKER, "SIGKILL", TRAINING), (WORKER, "SIGKILL", TRAINING), (WORKER, "SIGTERM", TRAINING),
    (CHECKPOINT, FLIPPED, BETWEEN), (CHECKPOINT, TRUNCATED, BETWEEN), (CHECKPOINT, MISSING, BETWEEN),
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """`when` and `pick`, in [0, 1): the position within its phase, and which of several processes is hit."""

    whom: str
    what: str
    moment: str
    when: float
    pick: float

    def __str__(self) -> str:
        return f"{self.what}, {self.whom}, {self.moment}"


class Deck:
    """Deals faults from a shuffled deck of all kinds, so that even few faults cover many kinds."""

    def __init__(self, rng: random.Random, kinds: Sequence[Kind]):
        self._rng, self._kinds = rng, kinds
        self._left: list[Kind] = []

    def deal(self, *, hangs: bool) -> Fault:
        """The next fault; `hangs`: whether there are other ranks, which notice a stopped one soon."""
        if not self._left:
            self._left = self._rng.sample(self._kinds, len(self._kinds))
        kind = self._left.pop()
        if kind[1] == "SIGSTOP" and not hangs:
            return self.deal(hangs=hangs)
        return Fault(*kind, self._rng.random(), self._rng.random())


def strike(fault: Fault, tree: Tree) -> bool:
    """Inject the fault into the processes; False if there is no such process."""
    ranks = tree.ranks()
    if not ranks or tree.launcher is None:
        return False
    of = {RANK: ranks, RANKS: ranks, LAUNCHER: [tree.launcher], WORKER: tree.workers()}[fault.whom]
    if not of:
        return False
    victims = of if fault.whom == RANKS else [of[int(fault.pick * len(of))]]
    hit = False
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            if fault.what == PAUSE:
                victim.suspend()
                time.sleep(1)
                victim.resume()
            else:
                victim.send_signal(signal.Signals[fault.what])
            hit = True
    return hit


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that has its marker."""
    return max((p.parent for p in run.glob("checkpoints/step_*/checkpoint.json")), default=None)


def corrupt(fault: Fault, run: Path) -> Path | None:
    """Damage one file of the newest checkpoint; returns the checkpoint, None if there is none."""
    newest = newest_checkpoint(run)
    if newest is None:
        return None
    files = json.loads((newest / "checkpoint.json").read_text())["files"]
    names = sorted(name for name, stored in files.items() if stored["bytes"] and (newest / name).is_file())
    file = newest / names[int(fault.pick * len(names))]
    at = int(fault.when * file.stat().st_size)
    if fault.what == MISSING:
        file.unlink()
    elif fault.what == TRUNCATED:
        os.truncate(file, at)
    else:
        with file.open("r+b") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1 << int(8 * fault.pick)]))
    return newest
