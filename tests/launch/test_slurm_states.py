"""Submitting, status, cancel and resume against a Slurm with faults, in any order: nothing that is said is false, a run
that can go on goes on, and cancel and resume work. The table that is meant is in docs/design/slurm-states.md."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from fake_slurm import ENDED, SAID, Clock, FakeJob, FakeSlurm, Script
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stamo_dist.cli import steer
from stamo_dist.errors import StamoError
from stamo_dist.exit_codes import EXIT_PREEMPTED
from stamo_dist.launch import failing, record, slurm, submit
from stamo_dist.launch import job as batch
from stamo_dist.launch.failing import LostTask
from stamo_dist.launch.profile import ClusterProfile
from stamo_dist.launch.record import Event, Launch, events
from stamo_dist.launch.sbatch import JobOrder
from stamo_dist.launch.status import Run, collect
from stamo_dist.run import lease
from stamo_dist.run.lease import Owner

STEPS, MAX_RESTARTS, BROKEN = 8, 2, 135
REAL_NOW, REAL_APPEND = time.time, record.append_line


class SlurmFaults(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder, self.slurm, self.stack = Path(tempfile.mkdtemp()), FakeSlurm(), ExitStack()
        self.run, self.full, self.may_end, self.stall = self.folder / "run", 0, False, 0
        self.step = self.before = 0
        self.broken = ""  # a node on which nothing starts
        Clock.ahead = 0.0
        for target, name, value in (
            (slurm, "_execute", self.slurm.execute),
            (slurm, "tool", lambda name: f"/slurm/{name}"),
            (slurm, "available", lambda: True),
            (submit, "take_snapshot", self._snapshot),
            (record, "append_line", self._append),
            (record, "datetime", Clock),
            (failing, "datetime", Clock),
            (lease, "time", SimpleNamespace(time=lambda: REAL_NOW() + Clock.ahead)),
            (batch, "time", SimpleNamespace(sleep=lambda seconds: self._script.stop("sleep"))),
            (batch.Job, "_srun", lambda job, command: self._srun(job)),
            (batch, "unwritable", lambda run: "the disk is full" if self.full else ""),
        ):
            self.stack.enter_context(mock.patch.object(target, name, value))
        self.stack.enter_context(mock.patch.dict(os.environ, {"XDG_STATE_HOME": str(self.folder / "state")}))

    # What the faults stand on ----------------------------------------------------------------------------------------

    @property
    def job(self) -> FakeJob:
        return self.slurm.newest

    @property
    def _script(self) -> Script:
        assert self.job.script is not None
        return self.job.script

    @property
    def _at(self) -> str:
        """Where the newest job's batch script is; "" without one that runs."""
        return self._script.at if self.job.busy else ""

    def _srun(self, job: batch.Job) -> int:
        code = self._script.stop("srun")
        if code in (1, BROKEN):
            job._lost = LostTask(job.nodes[0], 0, "Bus error" if code == BROKEN else f"Exited with exit code {code}")
        return code

    def _append(self, path: Path, line: str) -> None:
        if self.full:
            if self.full == errno.ENOSPC:
                with path.open("a") as f:
                    f.write(line[: len(line) // 2])
            raise OSError(self.full, os.strerror(self.full))
        REAL_APPEND(path, line)

    def _snapshot(self, run: str | Path, loaded: object) -> Path:
        if self.full:
            raise record.RunError("run_dir cannot be written")
        taken = Path(run) / "launch" / "snapshots" / "1"
        taken.mkdir(parents=True, exist_ok=True)
        return taken

    def _record(self) -> tuple[list[Event], Launch]:
        return events(self.run), record.read(self.run)

    def _save(self) -> None:
        """A checkpoint of the current step, if there is room."""
        if not self.full:
            where = self.run / "checkpoints" / f"step_{self.step:08d}"
            where.mkdir(parents=True, exist_ok=True)
            (where / "checkpoint.json").write_text("{}")

    @property
    def _saved(self) -> int:
        return max((int(p.name[5:]) for p in (self.run / "checkpoints").glob("step_*")), default=0)

    @property
    def _finished(self) -> bool:
        return (self.run / "exported.json").exists()

    def _beat(self, *, ended: bool = False, dead: bool = False) -> None:
        """The heartbeat of the process that trains, on another machine."""
        file = self.run / lease.FOLDER / "00000001"
        file.parent.mkdir(parents=True, exist_ok=True)
        owner = replace(Owner.this(), boot="another machine", node="n1", ended=ended)
        file.write_text(json.dumps(asdict(owner)))
        when = REAL_NOW() + Clock.ahead - (1000 if dead else 0)
        os.utime(file, (when, when))

    def _drive(self, order: int = 0) -> None:
        """Let the batch script go on to its next stop."""
        script = self._script
        if script.at == "srun":
            self.stall = 0 if self._saved > self.before else self.stall + 1
            self.may_end |= self.stall > MAX_RESTARTS
            self._beat(ended=order != -9, dead=True)
        script.drive(order)
        if script.over:
            script.join()
            self.slurm.settle(self.job)

    @initialize(seed=st.integers(0, 2**32 - 1))
    def submitted(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.slurm.nodes = self.slurm.nodes[: self.random.choice((1, 3))]
        self.submit()

    @rule()
    def anything(self) -> None:
        """One of the things that can happen now, drawn evenly: hypothesis itself prefers the first ones."""
        can = self._possible()
        weights = [3 if name.startswith(("start", "train", "leave", "ask")) else 1 for name in can]
        [name] = self.random.choices(list(can), weights)
        note(f"{name}: job {self.job.id}, {self.job.state}")
        can[name]()

    def _possible(self) -> dict[str, Callable[[], object]]:
        job, world = self.job, self.slurm
        can: dict[str, Callable[[], object]] = {"cancel": self.cancel}
        can |= {"the controller goes": partial(setattr, world, "away", True)} if not world.away else {}
        can |= {"the controller comes": partial(setattr, world, "away", False)} if world.away else {}
        can |= {"slow": partial(setattr, world, "slow", True)} if not world.slow else {}
        can |= {"room": partial(setattr, self, "full", 0)} if self.full else {}
        can |= {"no room": partial(setattr, self, "full", errno.ENOSPC)} if self._at == "srun" else {}
        can |= {"read-only": partial(setattr, self, "full", errno.EROFS)} if self._at == "srun" else {}
        can |= {"torn line": self.torn_line, "clock back": partial(self.clock_jumps, -3600.0)}
        if job.state == "PENDING" and not job.busy and not world.away:
            held = job.reason == "JobHeldUser"
            can |= {"start": self.start} if not held else {}
            can["release" if held else "hold"] = partial(setattr, job, "reason", "None" if held else "JobHeldUser")
        if job.state == "RUNNING":
            can |= {"time limit": self.time_limit, "preemption": partial(world.again, job), "scancel": self.scancel}
            can |= {"node fails": self.node_fails}
        if len(world.nodes) > 1 and not self.broken:
            can |= {"a node breaks": partial(setattr, self, "broken", world.nodes[0])}
        if self._at == "srun" and job.state == "RUNNING" and job.node == self.broken:
            can |= {"crash": partial(self.crash, BROKEN)}
        elif job.state == "RUNNING" and self._at == "srun":
            can |= {"train": partial(self.train, 1, save=False), "train and save": partial(self.train, 2, save=True)}
            can |= {"finish": partial(self.train, STEPS, save=True), "crash": partial(self.crash, 1)}
            can |= {"refuse": partial(self.crash, 2)}
        if self._at == "srun":
            can |= {
                "leave": partial(self.leave, killed_after=False),
                "be killed": partial(self.leave, killed_after=True),
            }
        if self._at == "srun" and job.state != "RUNNING":
            for code in (0, 137, -9):
                can[f"srun ends with {code}"] = partial(self.killed_before_it_has_saved, code)
        if self._at == "sleep":
            can |= {"ask again": self._drive}
        if job.state in ENDED and not job.busy:
            can |= {"resume": self.resume, "forget": self.forget}
        return can

    def submit(self) -> None:
        profile = ClusterProfile.model_validate({"max_restarts": MAX_RESTARTS})
        given, command = profile.model_dump(mode="json"), ["train", "{snapshot}/recipe.yaml"]
        launch = Launch("toy", str(self.run), "toy.yaml", command=command, cluster="c", profile=given)
        submit.submit(JobOrder(replace(launch, max_restarts=MAX_RESTARTS), profile))
        (self.run / "resolved.yaml").write_text(f"name: toy\ntrain: {{steps: {STEPS}, global_batch: 4}}\n")

    # What people do --------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        before, busy = self._record(), self.job.state not in ENDED
        try:
            said = steer.cancel(self.run)
        except StamoError:
            assert self._record() == before, "a refused cancel changes nothing"
        else:
            if "nothing to cancel" in said:
                assert not busy or self.job.cancelled or self.job.unwanted or self.slurm.away, said
            else:
                self.job.unwanted = True
                assert self.job.cancelled or self.job.state == "COMPLETING"
        self.may_end |= self.job.cancelled or self.job.unwanted

    def resume(self) -> None:
        before, ended, jobs = self._record(), self.job.state in ENDED, len(self.slurm.jobs)
        try:
            steer.resume(self.run)
        except StamoError:
            assert self._record() == before, "a refused resume changes nothing"
            assert len(self.slurm.jobs) == jobs
            return
        assert ended, "two jobs of one run"
        assert not self._finished
        self.may_end, self.stall = False, 0

    def scancel(self) -> None:
        """By another than `stamo cancel`."""
        if self.job.state in ("PENDING", "RUNNING"):
            self.slurm.end(self.job)
            self.may_end = True

    # What the job does -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        job = self.job
        if job.reason == "JobHeldUser":
            return
        job.state, job.reason = "RUNNING", "None"
        node = self.slurm.allocate(job)
        env = {"SLURM_JOB_ID": job.id, "SLURM_RESTART_COUNT": str(job.restarts), "SLURM_JOB_NODELIST": node}
        job.script = Script(self.run, env)
        self.step = self.before = self._saved
        self._drive()
        if self._at == "srun":
            self._beat()
        if self._at == "srun" and self.full:  # the ranks refuse
            self.may_end = True
            self._drive(2)

    def train(self, steps: int, save: bool) -> None:
        self.step = min(STEPS, self.step + steps)
        with (self.run / "metrics.jsonl").open("a") as f:
            f.write(json.dumps({"step": self.step, "loss": 1.0, "seconds": self.step}) + "\n")
        self._beat()
        if save or self.step == STEPS:
            self._save()
        if self.step == STEPS and self.full:  # the last step must be saved
            self.crash(2)
        elif self.step == STEPS:
            (self.run / "model").mkdir(exist_ok=True)
            (self.run / "exported.json").write_text(json.dumps({"step": STEPS}))
            self._drive(0)

    def leave(self, killed_after: bool) -> None:
        """Asked to stop, it saves; `killed_after`: with KillWait=0 its requeue is the script's last word."""
        self._script.kill_after_requeue = killed_after
        self._save()
        self._drive(EXIT_PREEMPTED)

    def killed_before_it_has_saved(self, code: int) -> None:
        """srun gives up with code 0, or says Killed; or nothing is left that could say anything."""
        self.may_end |= code == -9 and self.job.state == "COMPLETING"
        self._drive(code)

    def crash(self, code: int) -> None:
        self.may_end |= code == 2 or bool(self.full)
        self._drive(code)

    def time_limit(self) -> None:
        self.job.state, self.job.late = "COMPLETING", True
        if self._at == "sleep":  # it asked for a requeue as long as it could
            self.may_end = True
            self._drive(-9)

    def node_fails(self) -> None:
        self.slurm.again(self.job)
        self._drive(-9)

    # Faults ----------------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """MinJobAge has passed."""
        self.slurm.forgotten |= self.slurm.jobs
        self.slurm.jobs.clear()

    def torn_line(self) -> None:
        with (self.run / "launch" / "events.jsonl").open("a") as f:
            f.write('{"event": "finis')

    def clock_jumps(self, seconds: float) -> None:
        Clock.ahead += seconds
        if self._at == "srun":
            self._beat()

    # What has to hold ------------------------------------------------------------------------------------------------

    def _look(self) -> Run:
        slow, self.slurm.slow = self.slurm.slow, False
        try:
            return collect([self.run])[0]
        finally:
            self.slurm.slow = slow

    @invariant()
    def status_is_true(self) -> None:
        job, state = self.job, self._look().state
        said = set(SAID[job.state])
        if job.cancelled or job.unwanted:
            said |= {"cancelled"}
        if self._finished and job.state not in ("PENDING", "RUNNING"):
            said = {"finished"} | ({"preempted", "cancelled"} if job.state == "COMPLETING" else set())
        if self.slurm.away:
            said |= {"unknown"} | ({"finished"} if self._finished else set())
            said |= {"failed"} if self.stall > MAX_RESTARTS else set()  # it gave up, whatever Slurm does with its job
            said |= {"running"} if self._at == "srun" else set()  # its heart beats
        elif job.id in self.slurm.forgotten:
            said |= {"lost", "stopped", "failed"} if not self._finished else set()  # its own last word
        assert state.word in said, f"{state} while job {job.id} is {job.state}: {[e.event for e in events(self.run)]}"

    @invariant()
    def what_fails_once_is_not_left_out(self) -> None:
        blamed = Counter(node for e in events(self.run) for node in e.blamed)
        assert all(blamed[node] > 1 for node in self.job.excluded)

    @invariant()
    def nodes_that_are_left_out_are_said(self) -> None:
        run = self._look()
        if self.job.excluded and run.state.word in ("queued", "requeued"):
            assert f"stays off {','.join(sorted(self.job.excluded))}" in run.state.detail

    def teardown(self) -> None:
        try:
            if self.slurm.jobs or self.slurm.forgotten:
                self._mend()
                self._goes_on()
                if not self._finished:
                    assert self.may_end, f"{self._look().state}: it could go on: {[str(e) for e in events(self.run)]}"
                    steer.resume(self.run)
                    self.may_end, self.stall = False, 0
                    self._goes_on()
                assert self._look().state.word == "finished"
        finally:
            if self.slurm.jobs and self.job.busy:
                self._script.drive(-9)
            self.stack.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _mend(self) -> None:
        self.slurm.away = self.slurm.slow = False
        self.full = 0
        if self.job.reason == "JobHeldUser":
            self.job.reason = "None"

    def _goes_on(self) -> None:
        """All that can happen without a hand."""
        for _ in range(100):
            if self._at == "sleep":
                self._drive()
            elif self._at == "srun" and self.job.state == "RUNNING" and self.job.node == self.broken:
                self.crash(BROKEN)
            elif self._at == "srun" and self.job.state == "RUNNING":
                self.train(STEPS, save=True)
            elif self._at == "srun":
                self.leave(killed_after=False)
            elif self.job.state == "PENDING":
                self.start()
            else:
                return
            self.status_is_true()
        raise AssertionError("no end")


SlurmFaults.TestCase.settings = settings(
    max_examples=200, stateful_step_count=25, deadline=None, derandomize=True, database=None,
    phases=[Phase.generate],  # shrinking takes minutes
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestSlurmFaults = SlurmFaults.TestCase
