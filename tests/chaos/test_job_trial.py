"""A job under faults that does not go on by itself is a problem; which fault comes next. tests/slurm has a real one."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest

from stamo_dist.chaos import job_trial
from stamo_dist.chaos.faults import Fault
from stamo_dist.chaos.job_faults import Nobody
from stamo_dist.chaos.job_trial import JobTrial
from stamo_dist.chaos.trial import FaultSchedule
from stamo_dist.launch.record import Event, Launch, record
from stamo_dist.launch.slurm import SlurmJob

REQUEUE = ("the job", "scontrol requeue")


def fault(moment: str, pick: float = 0) -> Fault:
    return Fault(*REQUEUE, moment, 0, pick)


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """`trial(state, reason, *faults)`: of a job that Slurm says this of, until it is cancelled."""

    def make(state: str, reason: str = "None", *faults: Fault) -> JobTrial:
        job = SlurmJob("7", state, reason, None, "n1", 1, "0:10", "1:00", "low", "me", "toy")
        cancelled: list[str] = []
        monkeypatch.setattr(job_trial.slurm, "jobs", lambda *_, **__: [] if cancelled else [job])
        monkeypatch.setattr(job_trial.slurm, "cancel", lambda *ids, **_: cancelled.extend(ids))
        monkeypatch.setattr(job_trial, "submit", lambda order: SimpleNamespace(job="7"))
        order = SimpleNamespace(launch=Launch("toy", str(tmp_path), "toy.yaml"))
        schedule = FaultSchedule(deque(faults), random.Random(0), gap=5)
        return JobTrial(order, schedule, Nobody(), patience=1, say=lambda _: None)

    return make


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("PENDING", "launch failed requeued held", "needs a hand: PENDING, launch failed requeued held"),
        ("FAILED", "NonZeroExitCode", "needs a hand: FAILED, NonZeroExitCode"),
        ("COMPLETED", "None", "needs a hand: COMPLETED"),  # the folder says nothing of a finished training
        ("PENDING", "Resources", "it did not end within 1 s"),
    ],
)
def test_needs_a_hand(trial, tmp_path, state, reason, said):
    record(tmp_path, Event("started"))
    record(tmp_path, Event("requeued", reason="it ended with code 1"))
    outcome = trial(state, reason).run()
    assert outcome.starts == 1
    assert not outcome.finished
    [problem] = outcome.problems
    assert said in problem
    assert "recorded last: requeued (it ended with code 1)" in problem or "within" in problem


def test_faults_of_starts_take_turns_with_others(trial, tmp_path: Path):
    """A start is struck only when one has been ended, and never two in a row: they bring the run no further."""
    tried = trial("RUNNING", "None", fault("starting"), fault("queued again"), fault("training"))
    record(tmp_path, Event("started"))
    assert tried._take().moment == "training"
    tried._ended = 1  # as a fault leaves it
    assert tried._take().moment in ("starting", "queued again")
    tried._last = "starting"
    tried._faults.append(fault("saving"))
    assert tried._take().moment == "saving"


def test_a_fault_that_hits_nothing_is_dealt_again_thrice(trial):
    tried = trial("RUNNING")
    for left in (1, 1, 0):
        tried._again(fault("training"))
        assert len(tried._faults) == left
        tried._faults.clear()
