"""One training under faults as a job of Slurm: submitted once and disturbed until it has finished, by itself."""

from __future__ import annotations

import getpass
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from stamo_dist.chaos.faults import LEAVING, QUEUED, SAVING, STARTING, TRAINING, Fault
from stamo_dist.chaos.job_faults import ACTS, Operator, strike
from stamo_dist.chaos.monitor import HungError, Monitor, TrainingStart, tail
from stamo_dist.chaos.trial import FaultSchedule, Injected, Outcome
from stamo_dist.launch import slurm
from stamo_dist.launch.ends import newest_step, trained
from stamo_dist.launch.record import events, main_log
from stamo_dist.launch.sbatch import JobOrder
from stamo_dist.launch.submit import submit

_EVERY = 0.4  # seconds between two questions to Slurm
_UNIMPRESSED = (50, 10.0)  # steps and seconds after which a fault that ends a start has missed
_CANCEL = 60.0  # seconds for a job to be cancelled
_TRIES = 3  # of one fault


class JobTrial:
    """Args:
    order: The job to submit.
    schedule: The faults.
    operator: Does those that its user cannot do.
    patience: Seconds without a change, in the queue too, after which it counts as hung.
    say: Called with a line for each fault.
    """

    def __init__(
        self,
        order: JobOrder,
        schedule: FaultSchedule,
        operator: Operator,
        *,
        patience: float,
        say: Callable[[str], None],
    ):
        self._order, self._operator, self._say = order, operator, say
        self._faults, self._rng, self._gap = schedule.faults, schedule.rng, schedule.gap
        self._run = Path(order.launch.run_dir)
        self._monitor = Monitor(self._run, patience, poll=0.01)
        self._id = ""
        self._seen: slurm.SlurmJob | None = None
        self._asked = 0.0  # when Slurm was asked last
        self._ended = 0  # starts that a fault or request has ended, or is ending
        self._started = datetime.min.replace(tzinfo=timezone.utc)  # of the current start
        self._counted, self._reached = 0, 0  # starts, steps of which repeated ones are counted
        self._startup = 1.0  # seconds from the start of a job to that of its training
        self._since = 0  # step of the last fault
        self._last = ""  # its phase
        self._missed: Counter[Fault] = Counter()
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Run until the job has ended."""
        try:
            self._id = submit(self._order).job or ""
            while self._faults and not self._over():
                self._next()
            self._monitor.until(self._over, "end")
            self._judge()
        except HungError as e:
            self._problem(str(e))
        finally:
            self._starts()
            self._count()
            self._cancel()
        return self.outcome

    def _next(self) -> None:
        """Inject one more fault, unless the job ends before."""
        fault = self._take()
        if fault.moment in (QUEUED, STARTING) and not self._between:
            if not self._comes(TRAINING):
                return self._faults.appendleft(fault)
            self._request("scontrol requeue")
        if not self._comes(fault.moment):
            return self._faults.appendleft(fault)
        if fault.moment == LEAVING:
            self._request("SIGUSR1")
        elif fault.moment == STARTING:
            time.sleep(fault.when * self._startup)
        starts, phase, step = self._starts(), self._phase(fault), self._monitor.step()
        hit = self._seen is not None and strike(fault, self._seen, self._run, self._operator)
        if hit and fault.moment != LEAVING and ACTS[fault.whom, fault.what][0].ends:
            hit = self._ends(starts)
        if hit:
            injected = Injected(fault.whom, fault.what, phase, step)
            self.outcome.faults.append(injected)
            self._say(f"{self._run.name}: step {step}: {injected}")
            self._last = phase
        else:
            self._again(fault)
        self._since = self._monitor.step()
        return None

    def _take(self) -> Fault:
        """The next fault that fits; never two in a row at starts, which must bring the run further now and then."""
        for _ in range(len(self._faults)):
            early = self._faults[0].moment in (QUEUED, STARTING)
            if not early or (self._between and self._last not in (QUEUED, STARTING)):
                break
            self._faults.rotate(-1)
        return self._faults.popleft()

    def _again(self, fault: Fault) -> None:
        """Deal a fault again that hit nothing."""
        self._missed[fault] += 1
        over = self._missed[fault] == _TRIES
        self._say(f"{self._run.name}: hit nothing{', left out' if over else ''}: {fault}")
        if not over:
            self._faults.append(fault)

    @property
    def _between(self) -> bool:
        """Whether a start has been ended, and the next one has not begun yet."""
        return self._ended >= self._starts()

    def _request(self, how: str) -> None:
        """Have the run leave, which is not counted as a fault."""
        starts = self._starts()
        with suppress(slurm.SlurmError):
            if how == "SIGUSR1":
                before = self._monitor.unfinished()
                slurm.cancel(self._id, signal="USR1")
                self._monitor.until(
                    lambda: self._over() or self._left(starts) or bool(self._monitor.unfinished() - before), "leave"
                )
                self._ended = starts
            else:
                slurm.requeue(self._id)
                self._ends(starts)

    def _ends(self, starts: int) -> bool:
        """Whether start number `starts` ends now; False if it goes on all the same, or the run has finished."""
        step, began = self._monitor.step(), time.monotonic()

        def unimpressed() -> bool:
            return self._monitor.step() > step + _UNIMPRESSED[0] and time.monotonic() > began + _UNIMPRESSED[1]

        self._monitor.until(lambda: self._left(starts) or self._over() or unimpressed(), "end by the fault")
        if self._left(starts) or (self._over() and not trained(self._run)):
            self._ended = starts
            return True
        return False

    def _left(self, starts: int) -> bool:
        """Whether start number `starts` has ended and the job goes on."""
        if self._starts() > starts:
            return True
        job = self._look()
        return job is not None and job.state == "PENDING"

    def _comes(self, moment: str) -> bool:
        """Wait for this phase; False if the job ended before."""
        steps = max(1, round(self._gap * (0.3 + 1.4 * self._rng.random())))
        before = self._monitor.unfinished()

        def come() -> bool:
            if moment == QUEUED:
                job = self._look()
                return self._starts() > self._ended or (job is not None and job.state == "PENDING")
            if moment == STARTING:
                return self._starts() > self._ended
            after = self._after()
            if after is None or self._between or self._monitor.step() < max(after, self._since) + steps:
                return False
            if (newest_step(self._run) or 0) <= after:  # starts without progress count against max_restarts
                return False
            return moment != SAVING or bool(self._monitor.unfinished() - before)

        self._monitor.until(lambda: come() or self._over(), f"come to where it is struck ({moment})")
        return not self._over()

    def _phase(self, fault: Fault) -> str:
        """The phase in which the fault really happens."""
        job = self._look(fresh=True)
        if job is None or job.state == "PENDING":
            return QUEUED
        saving = bool(self._monitor.unfinished())
        if fault.moment == LEAVING:
            return LEAVING if saving else f"{LEAVING}, after the save"
        if self._after() is None:
            return STARTING
        return SAVING if saving else TRAINING

    def _starts(self) -> int:
        """How often the job has started so far."""
        started = [event for event in events(self._run) if event.event == "started"]
        if started:
            self._started = datetime.fromisoformat(started[-1].time)
        self.outcome.starts = len(started)
        return len(started)

    def _after(self) -> int | None:
        """The step after which the current start trains, None before it does."""
        begun = self._count()
        if not self._starts() or not begun:
            return None
        passed = (datetime.fromisoformat(begun[-1].time) - self._started.replace(microsecond=0)).total_seconds()
        if passed < 0:  # an earlier start
            return None
        self._startup = max(self._startup, passed)
        return begun[-1].after

    def _count(self) -> list[TrainingStart]:
        """Count repeated steps; returns the starts that have reached training."""
        begun = self._monitor.begun()
        for start in begun[self._counted :]:
            self.outcome.redone += max(0, self._reached - start.after)
            self._reached = start.after
        self._counted = len(begun)
        self._reached = max(self._reached, self._monitor.step())
        return begun

    def _look(self, *, fresh: bool = False) -> slurm.SlurmJob | None:
        """What Slurm says of the job: the last that it said, while it does not answer."""
        if fresh or time.monotonic() > self._asked + _EVERY:
            with suppress(slurm.SlurmError):
                self._seen = next(iter(slurm.jobs([self._id], user=getpass.getuser())), None)
            self._asked = time.monotonic()
        return self._seen

    def _over(self) -> bool:
        """Whether nothing happens to the job any more unless somebody does something."""
        job = self._look()
        return job is None or not job.active or "held" in job.reason.lower() or job.state == "REQUEUE_HOLD"

    def _judge(self) -> None:
        job = self._look(fresh=True)
        if trained(self._run) and job is not None and job.state == "COMPLETED":
            self.outcome.finished = True
            return
        said = "Slurm knows it no more" if job is None else f"{job.state}, {job.reason}"
        last = next((f"{e.event} ({e.reason})" for e in reversed(events(self._run))), "nothing")
        self._problem(f"needs a hand: {said}; recorded last: {last}")

    def _problem(self, text: str) -> None:
        at = f"{self._run}, job {self._id}: {text}; its output ends with"
        self.outcome.problems.append("\n    ".join([at, *tail(main_log(self._run))]))

    def _cancel(self) -> None:
        """Leave nothing in the queue; says so where Slurm does not answer."""
        deadline = time.monotonic() + _CANCEL
        while self._id and (job := self._look(fresh=True)) is not None and job.active:
            if time.monotonic() > deadline:
                self._say(f"{self._run.name}: job {self._id} is still there; `scancel {self._id}` ends it")
                break
            with suppress(slurm.SlurmError):
                slurm.cancel(self._id)
            time.sleep(_EVERY)
