"""A run's state, from what is known: its events, what Slurm says, and the heartbeat in its folder."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from stamo_dist.launch.record import Event
from stamo_dist.launch.run_progress import Progress
from stamo_dist.launch.slurm import SlurmJob
from stamo_dist.launch.state import judge_state
from stamo_dist.run.lease import STALE, Owner

NOW = datetime.now().astimezone()
HERE = Owner.this()
ELSEWHERE = replace(HERE, boot="another machine", node="n7")
DEAD = replace(HERE, started="0")


def events(text: str) -> list[Event]:
    return [Event(word, job="7", time=NOW.isoformat()) for word in ("submitted " + text).split()]  # type: ignore[arg-type]


def job(state: str, reason: str = "None", start: float | None = None) -> SlurmJob:
    at = None if start is None else NOW + timedelta(seconds=start)
    return SlurmJob("7", state, reason, at, "n[1-2]", 2, "0:10", "1:00:00", "low", "me", "toy")


def training(owner: Owner | None = None, silence: float = 1.0, **more: object) -> Progress:
    values = {"steps": 20, "step": 7, "checkpoint": 5, "written": NOW.timestamp() + 60, "owner": owner} | more
    return Progress(silence=silence if owner else None, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("progress", "history", "asked", "title", "detail"),
    [
        (Progress(), "", job("PENDING", "Priority", 7200), "queued", "others come first, start expected"),
        (Progress(), "", job("PENDING", "QOSMaxJobsPerUserLimit"), "queued", "a limit of your account: QOSMax"),
        (Progress(), "", job("PENDING", "DependencyNeverSatisfied"), "stopped", "an earlier job failed"),
        (Progress(), "started", job("RUNNING"), "starting", ""),
        (training(HERE), "started", job("RUNNING"), "running", ""),
        (training(HERE, STALE + 60), "started", job("RUNNING"), "running", "no heartbeat for 2:30"),
        (training(HERE, STALE + 60), "started exporting", job("RUNNING"), "running", "exporting"),
        (training(HERE, terms={"save_failed": 6}), "started", job("RUNNING"), "running", "STEP 6 COULD NOT BE SAVED"),
        pytest.param(
            training(HERE, terms={"save_failed": 6}), "started", None, "running", "; STEP 6 COULD", id="not saved"
        ),
        (training(HERE), "started preempted", job("RUNNING"), "preempted", ""),
        (training(), "started preempted requeued", job("PENDING", "BeginTime", 6), "requeued ×1", "may not start"),
        (training(), "started", job("PENDING", "None"), "requeued ×1", ""),  # after a node failure Slurm did it
        (training(HERE), "started preempted requeued started", job("RUNNING"), "running ×1", ""),
        (training(HERE), "started cancelled", job("COMPLETING"), "cancelled", "at step 7 of 20"),
        # Slurm's word counts while it has the job.
        (training(HERE), "started cancelled", job("RUNNING"), "running", ""),
        (training(), "started cancelled", job("TIMEOUT"), "failed", "the time limit came"),
        (training(), "started failed", job("CANCELLED"), "cancelled", "at step 7 of 20"),
        (Progress(), "", job("PENDING", "JobHeldUser", 7200), "queued", "held; `scontrol release` lets it go"),
        (Progress(), "", job("PENDING", "QOSNotAllowed", 7200), "queued", "it never starts so: the partition does not"),
        (
            Progress(),
            "",
            job("PENDING", "Job's account not permitted to use this partition (staff allows staff,admins not root)", 9),
            "queued",
            "it never starts so: the partition does not take the account; `stamo cancel`, mend the profile and",
        ),
        (training(ELSEWHERE, STALE + 1), "started", "silent", "unknown", "Slurm does not answer, at step 7 of 20"),
        (training(replace(ELSEWHERE, ended=True)), "started preempted", "silent", "unknown", "Slurm does not answer"),
        (training(), "started", job("CANCELLED"), "cancelled", "at step 7 of 20"),
        (training(), "started", job("NODE_FAIL"), "failed", "a node failed"),
        (Progress(), "", job("FAILED", "JobLaunchFailure"), "failed", "could not start it: its nodes need the run"),
        (training(), "started", job("OUT_OF_MEMORY"), "failed", "out of memory"),
        (training(), "started", job("PREEMPTED"), "stopped", "does not requeue"),
        (training(step=20, checkpoint=20, exported=True), "started", job("COMPLETED"), "finished", ""),
        # Slurm has forgotten the job, or does not answer: the folder tells.
        (training(), "started finished", None, "finished", ""),
        (training(), "started failed requeued started", None, "lost", "job 7 is gone; `stamo resume` goes on after"),
        (Progress(), "", None, "lost", "it never began to train"),
        pytest.param(training(HERE), "started", None, "running", f"process {os.getpid()}", id="here"),
        (training(ELSEWHERE, 30), "started", "silent", "running", "on n7"),
        (training(ELSEWHERE, STALE + 1), "started", None, "lost", "`stamo resume` goes on after step 5"),
        (training(DEAD), "started", None, "lost", "is gone"),
        (training(replace(HERE, ended=True)), "started", None, "stopped", "at step 7 of 20"),
        (Progress(), "", "silent", "unknown", "Slurm does not answer"),
    ],
)
def test_states(progress, history, asked, title, detail):
    answer = asked if isinstance(asked, SlurmJob) else None
    state = judge_state(progress, events(history), answer, asked=asked != "silent", now=NOW)
    assert state.title == title
    assert detail in state.detail
    assert bool(detail) == bool(state.detail)


@pytest.mark.parametrize(
    ("history", "watched", "title"),
    [("started", True, "running"), ("started cancelled", True, "cancelled"), ("started", False, "lost")],
)
def test_states_on_this_machine(history, watched, title):
    progress = training(HERE if watched else DEAD)
    assert judge_state(progress, events(history), None, asked=True, watched=watched, now=NOW).title == title


def test_no_start_is_expected_of_what_is_held_or_never_starts():
    for reason in ("JobHeldUser", "job requeued in held state", "AccountNotAllowed"):
        state = judge_state(Progress(), events(""), job("PENDING", reason, 7200), asked=True, now=NOW)
        assert "start expected" not in state.detail


def test_a_training_is_finished_when_its_folder_says_so():
    def said(progress: Progress, history: str, answer: SlurmJob | None) -> str:
        return judge_state(progress, events(history), answer, asked=True, trains=True, now=NOW).word

    whole = training(step=20, checkpoint=20, exported=True)
    assert said(training(), "started finished", job("COMPLETED")) == "stopped"
    assert said(training(), "started finished", None) == "stopped"
    assert said(whole, "started cancelled", job("CANCELLED")) == "finished"
    assert said(whole, "started", None) == "finished"
