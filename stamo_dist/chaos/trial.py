"""One training under faults: started and disturbed again and again until it finishes."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stamo_dist.chaos.faults import (
    BETWEEN,
    CHECKPOINT,
    LEAVING,
    PAUSE,
    RANK,
    RANKS,
    SAVING,
    STARTING,
    TRAINING,
    WORKER,
    Fault,
    corrupt,
    newest_checkpoint,
    strike,
)
from stamo_dist.chaos.monitor import HungError, Monitor, tail
from stamo_dist.chaos.starts import Start, Starter, Tree
from stamo_dist.exit_codes import EXIT_PREEMPTED


@dataclass(frozen=True)
class Pace:
    """Durations in seconds, measured on undisturbed runs."""

    start: float  # until the first step is done
    step: float
    save: float


@dataclass(frozen=True)
class FaultSchedule:
    """The faults to inject, and their distance."""

    faults: deque[Fault]  # consumed until it is empty or the training ends
    rng: random.Random
    gap: float  # steps between two faults, on average


@dataclass
class Injected:
    """A fault that was injected."""

    whom: str
    what: str
    moment: str
    step: int  # last step logged before the fault
    code: int | None = None  # exit code of the start

    def __str__(self) -> str:
        return f"{self.what} {'of' if self.whom == CHECKPOINT else 'to'} {self.whom}, {self.moment}"

    @property
    def harmless(self) -> bool:
        """Whether the run continues undisturbed after it."""
        return self.what == PAUSE or (self.whom, self.what) == (WORKER, "SIGTERM")


@dataclass
class Outcome:
    """The course of one training under faults."""

    starts: int = 0
    redone: int = 0  # repeated steps
    processes: list[int] = field(default_factory=list)  # of each start
    faults: list[Injected] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # unexpected events
    finished: bool = False


class Trial:
    """Args:
    starter: Starts its processes.
    arguments: `stamo` arguments of the training, without the number of processes.
    run: The run folder; output of the starts goes to `run`.log.
    sizes: Numbers of processes, one for each start in turn.
    schedule: The faults.
    pace: Durations measured on undisturbed runs.
    patience: Seconds without a change after which it counts as hung.
    say: Called with a line for each fault.
    """

    def __init__(
        self,
        starter: Starter,
        arguments: Sequence[str],
        run: Path,
        sizes: Sequence[int],
        schedule: FaultSchedule,
        *,
        pace: Pace,
        patience: float,
        say: Callable[[str], None],
    ):
        self._starter, self._arguments, self._sizes = starter, arguments, sizes
        self._faults, self._rng, self._gap = schedule.faults, schedule.rng, schedule.gap
        self._pace, self._say = pace, say
        self._monitor, self._log = Monitor(run, patience), run.with_name(f"{run.name}.log")
        self._trees: list[Tree] = []
        self._reached, self._begun = 0, 0
        self._last: int | None = None  # step of the previous fault, in this start
        self._damaged = False  # a checkpoint, since the last start that left by itself
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Run until the training finishes, or something unexpected happens."""
        try:
            while not (self.outcome.finished or self.outcome.problems):
                self._start()
        except HungError as e:
            self._problem(str(e))
        finally:
            for tree in self._trees:
                tree.kill()
        return self.outcome

    def _start(self) -> None:
        last = self.outcome.processes[-1:]
        size = self._rng.choice([n for n in self._sizes if n not in last] or self._sizes)
        self._begun = len(self._monitor.begun())
        self._look()
        start = self._starter.start(self._arguments, self._log, size, self._monitor.path)
        tree = Tree(start, size)
        self._trees = [*(t for t in self._trees if not t.gone), tree]
        self.outcome.starts += 1
        self.outcome.processes.append(size)
        struck: Injected | None = None
        self._last = None
        while (struck is None or struck.harmless) and self._faults and self._wait_for_phase(self._faults[0], start):
            struck = self._inject(self._faults.popleft(), tree) or struck
        self._monitor.until(lambda: start.poll() is not None, "end")
        code = start.poll()
        self._look()
        if struck is not None:
            struck.code = code
            self._say(f"{self._monitor.path.name}: step {struck.step}: {struck}: code {code}")
        if code == 0:
            self._monitor.until(lambda: tree.gone, "leave no rank behind")
            self.outcome.finished = True
        elif struck is None or struck.harmless:
            if not self._begins_anew(code):
                self._problem(f"a start that nothing was done to ended with code {code}")
        elif self._rng.random() < 0.5:  # otherwise the next start would meet ranks that are still saving
            self._monitor.until(lambda: tree.gone, "end its ranks")

    def _begins_anew(self, code: int | None) -> bool:
        """Whether a start may leave to be started again: once, when the damaged checkpoint was the run's only one.

        With `init_from` the next start reads the weights with which the run begins.
        """
        damaged, self._damaged = self._damaged, False
        return code == EXIT_PREEMPTED and damaged and newest_checkpoint(self._monitor.path) is None

    def _wait_for_phase(self, fault: Fault, start: Start) -> bool:
        """Wait for the fault's phase; False if the training ended before."""
        steps = max(1, round(self._gap * (0.3 + 1.4 * self._rng.random())))
        began = time.monotonic()
        before = self._monitor.unfinished()

        def come() -> bool:
            if fault.moment == STARTING:
                return time.monotonic() - began >= fault.when * self._pace.start
            begun = self._look()
            if begun is None or self._monitor.step() < (begun if self._last is None else self._last) + steps:
                return False
            if fault.moment == BETWEEN:
                return newest_checkpoint(self._monitor.path) is not None
            return fault.moment != SAVING or bool(self._monitor.unfinished() - before)

        self._monitor.until(lambda: start.poll() is not None or come(), f"come to where it is struck ({fault})")
        if fault.moment in (TRAINING, SAVING):
            time.sleep(fault.when * (self._pace.step if fault.moment == TRAINING else self._pace.save))
        return start.poll() is None

    def _inject(self, fault: Fault, tree: Tree) -> Injected | None:
        """Inject the fault; None if its target does not exist now: then it is tried again later."""
        asked = False
        if fault.moment == STARTING:
            self._monitor.until(lambda: tree.gone or bool(tree.ranks()), "start its ranks")
        elif fault.moment == LEAVING:
            before = self._monitor.unfinished()
            asked = strike(replace(fault, whom=RANK, what="SIGTERM"), tree)
            self._monitor.until(lambda: tree.gone or bool(self._monitor.unfinished() - before), "save on leaving")
            time.sleep(0.7 * fault.when * self._pace.save)
        injected = Injected(fault.whom, fault.what, self._actual_phase(fault), self._monitor.step())
        if fault.whom == CHECKPOINT:
            done = strike(replace(fault, whom=RANKS, what="SIGKILL"), tree)
            for each in self._trees:
                self._monitor.until(lambda each=each: each.gone, "end its ranks")  # type: ignore[misc]
            done = done and corrupt(fault, self._monitor.path) is not None
            self._damaged |= done
        else:
            done = strike(fault, tree)
        self._last = injected.step
        if not done:
            self._faults.append(fault)
            if not asked:
                return None
            injected = Injected(RANK, "SIGTERM", TRAINING, injected.step)  # it had exited before the second signal
        self.outcome.faults.append(injected)
        return injected

    def _actual_phase(self, fault: Fault) -> str:
        """The phase in which the fault really happens: a save may have begun or ended meanwhile."""
        saving = bool(self._monitor.unfinished())
        if fault.moment in (TRAINING, SAVING):
            return SAVING if saving else TRAINING
        return f"{LEAVING}, after the save" if fault.moment == LEAVING and not saving else fault.moment

    def _look(self) -> int | None:
        """The step from which this start continued, None before it trains; counts repeated steps."""
        begun = self._monitor.begun()
        if len(begun) <= self._begun:
            self._reached = max(self._reached, self._monitor.step())
            return None
        after = begun[-1].after
        self.outcome.redone += max(0, self._reached - after)
        self._reached = after
        return after

    def _problem(self, text: str) -> None:
        at = f"{self._monitor.path}: {text}; its start was number {self.outcome.starts}; its output ends with"
        self.outcome.problems.append("\n    ".join([at, *tail(self._log)]))
