"""What status says of runs that ended otherwise than they should: by hand, with an error, or refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from fake_slurm import FakeJob, FakeSlurm

from stamo_dist.cli import steer
from stamo_dist.errors import CheckpointError, DataError, RecipeError, RunError
from stamo_dist.launch import slurm
from stamo_dist.launch.record import Event, Launch, main_log, rank_log, record
from stamo_dist.launch.status import Run, collect, find
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.lease import FOLDER, LeaseEnd, Owner, acquire

TRAIN = ["/usr/bin/stamo", "train", "a recipe.yaml", "--resume", "auto", "--set", "train.steps=20"]


def by_hand(run: Path, command: list[str] = TRAIN, processes: int = 1) -> RunFolder:
    """A run of 20 steps as `stamo train` leaves its folder after 12, of which 10 are saved."""
    folder = RunFolder(run)
    folder.prepare()
    resolved = f"name: {run.name}\ntrain: {{steps: 20, global_batch: 8}}\n"
    folder.describe("", resolved, command, step=0, processes=processes, sources={})
    folder.metrics.write_text(
        "".join(json.dumps({"step": i, "loss": 1 / i, "seconds": i}) + "\n" for i in range(1, 13))
    )
    saved = folder.checkpoints / "step_00000010"
    saved.mkdir()
    (saved / "checkpoint.json").write_text("{}")
    return folder


def dead(run: Path) -> None:
    """Its process was killed."""
    (run / FOLDER).mkdir()
    (run / FOLDER / "00000001").write_text(json.dumps(asdict(replace(Owner.this(), started="0"))))


def status(run: Path) -> Run:
    [found] = collect([run])
    return found


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def test_stopped_by_hand(tmp_path):
    by_hand(tmp_path / "run")
    with acquire(tmp_path / "run") as lease:
        assert status(tmp_path / "run").state.word == "running"
        lease.end(LeaseEnd("stopped", "by hand (Ctrl-C twice)"))
    state = status(tmp_path / "run").state
    again = "`stamo train 'a recipe.yaml' --set train.steps=20`"
    assert (state.word, state.detail) == (
        "stopped", f"by hand (Ctrl-C twice) at step 12 of 20; {again} goes on after step 10"
    )  # fmt: skip
    with pytest.raises(RunError, match="was not submitted; ") as refused:
        steer.resume(tmp_path / "run")
    assert again in str(refused.value)
    with acquire(tmp_path / "run"):  # the next start leaves as it should
        pass
    assert status(tmp_path / "run").state.detail == f"at step 12 of 20; {again} goes on after step 10"


@pytest.mark.parametrize(
    ("command", "processes", "again"),
    [
        (TRAIN, 2, "stamo train 'a recipe.yaml' --set train.steps=20 --nproc 2"),
        ([*TRAIN, "--nproc", "1"], 1, "stamo train 'a recipe.yaml' --set train.steps=20 --nproc 1"),
        (["script.py"], 1, "stamo train {run}/resolved.yaml"),
    ],
)
def test_a_killed_run_goes_on_by_its_own_command(tmp_path, monkeypatch, command, processes, again):
    dead(by_hand(tmp_path / "run", command, processes).path)
    state = status(tmp_path / "run").state
    assert state.word == "lost"
    command = again.format(run=tmp_path / "run")
    assert state.detail.endswith(f" is gone; `{command}` goes on after step 10")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    elsewhere = "" if "resolved" in again else f"cd {tmp_path} && "
    assert f"`{elsewhere}{command}` goes on" in status(tmp_path / "run").state.detail


ERROR = "source a: shard.00000.mds: sample 10: the sizes of its columns do not add up"


def fail(run: Path, error: Exception) -> None:
    with pytest.raises(type(error)), acquire(run):
        raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError(ERROR), ERROR),
        (RecipeError(["data.sources.a: no such folder", "b"]), "data.sources.a: no such folder"),
        (CheckpointError("step_10: was trained on another model:\n  - dim: 32 → 64\nrestore"), "dim: 32 → 64"),
        (ValueError("of a bug\nand more"), "ValueError: of a bug"),
    ],
)
def test_the_error_of_a_start_by_hand(tmp_path, error, said):
    by_hand(tmp_path / "run")
    fail(tmp_path / "run", error)
    state = status(tmp_path / "run").state
    assert (state.word, state.detail) == ("failed", f"{said} (at step 12 of 20)")


def test_the_rank_whose_error_ended_rank_0(tmp_path):
    """Which was killed then, or lost the connection to it; errors of earlier starts do not count."""
    run = by_hand(tmp_path / "run").path
    log, now = rank_log(run, 1), datetime.now(timezone.utc) + timedelta(seconds=1)
    log.write_text(f"rank 1 of 2 failed at {(now - timedelta(hours=1)).isoformat()}:\nerror: of an earlier start\n")
    fail(run, RuntimeError("Connection closed by peer"))
    assert status(run).state.detail.startswith("RuntimeError: Connection closed by peer")
    log.write_text(f"{log.read_text()}rank 1 of 2 failed at {now.isoformat()}:\nerror: {ERROR}\n")
    assert status(run).state.detail.startswith(f"rank 1: {ERROR} (RuntimeError: Connection closed")
    shutil.rmtree(run / FOLDER)
    dead(run)
    state = status(run).state
    assert state.word == "failed"
    assert state.detail.startswith(f"rank 1: {ERROR} (process {os.getpid()} on ")


def test_a_start_refused_before_there_is_a_run(tmp_path):
    fail(tmp_path / "new", DataError(ERROR))
    with pytest.raises(RunError, match=f"no run yet, its start failed: {ERROR}"):
        find([str(tmp_path / "new")])


@pytest.mark.parametrize(("job", "finished"), [("local-1", False), ("local-1", True), ("7", False), ("7", True)])
def test_a_submitted_start_that_was_refused(tmp_path, monkeypatch, job, finished):
    """On this machine and under Slurm, also where the run had finished before."""
    run = by_hand(tmp_path / "run")
    world = FakeSlurm()
    world.jobs["7"] = FakeJob("7", run.path, "", state="FAILED")
    monkeypatch.setattr(slurm, "_execute", world.execute)
    monkeypatch.setattr(slurm, "tool", lambda name: f"/slurm/{name}")
    Launch("run", str(run.path), "", command=["train", "r.yaml"], job_ids=[job]).write()
    for event in (Event("submitted"), Event("started", job), Event("failed", job, reason="refused, see the log")):
        record(run.path, event)
    main_log(run.path).write_text(f"--- start 1 of job {job}\nerror: {ERROR}\n")
    if finished:
        shutil.move(run.checkpoints / "step_00000010", run.checkpoints / "step_00000020")
        run.model.mkdir()
        run.exported.write_text('{"step": 20}')
    state = status(run.path).state
    said = ("finished", f"before; its last start failed: {ERROR}")
    assert (state.word, state.detail) == (said if finished else ("failed", f"{ERROR} (refused, see the log)"))


def test_a_cancelled_run_is_resumed_when_its_job_has_left(tmp_path, monkeypatch):
    run, world = tmp_path / "run", FakeSlurm()
    world.jobs["7"] = FakeJob("7", run, "", state="COMPLETING", cancelled=True)
    monkeypatch.setattr(slurm, "_execute", world.execute)
    monkeypatch.setattr(slurm, "tool", lambda name: f"/slurm/{name}")
    Launch("run", str(run), "", command=["train", "r.yaml"], job_ids=["7"], snapshot=str(run)).write()
    for event in (Event("submitted"), Event("started", "7"), Event("cancelled", "7")):
        record(run, event)
    with pytest.raises(RunError, match="is cancelled, and its job 7 leaves its nodes; ask again when it has"):
        steer.resume(run)
