"""Runs on this machine without a scheduler: started again after a signal, given up after a crash loop, cancelled."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import write_recipe

from stamo_dist.launch import local, supervise, supervisor
from stamo_dist.launch.ends import newest_step
from stamo_dist.launch.record import Event, Launch, events, main_log, now, rank_log, record


def submit(run: Path, *command: object, processes: int = 1, after: tuple[Path, ...] = ()) -> Path:
    launch = Launch(
        name=run.name, run_dir=str(run), recipe="", command=[str(c) for c in command], processes_per_node=processes,
        max_restarts=2, after=[str(a) for a in after],
    )  # fmt: skip
    launch.write()
    record(run, Event("submitted"))
    return run


def wait(run: Path, *last: str, seconds: float = 120) -> list[str]:
    deadline = time.monotonic() + seconds
    while (found := [e.event for e in events(run)])[-1] not in last:
        assert time.monotonic() < deadline, f"{found}\n{main_log(run).read_text()}"
        time.sleep(0.05)
    return found


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_ranks_share_the_cores(tmp_path):
    """The launcher's own imports once set the number of threads, which every rank, and every Slurm job, inherited."""
    program = f"""
import pathlib, sys
import stamo_dist.cli.app, stamo_dist.launch.submit
from stamo_dist.launch.local import Ranks
show = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
with Ranks(show, 1, pathlib.Path({str(tmp_path)!r})) as ranks:
    ranks.wait()
with Ranks(show, len(os.sched_getaffinity(0)), pathlib.Path({str(tmp_path)!r})) as ranks:
    ranks.wait()
"""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    run = subprocess.run(
        [sys.executable, "-c", "import os\n" + program], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert [int(n) for n in run.stdout.split()] == [len(os.sched_getaffinity(0)), 1], run.stdout


def test_a_run_goes_on_after_a_signal_and_the_next_follows(toy, tmp_path, ranks):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    run = submit(tmp_path / "run", "train", recipe, processes=2)
    following = submit(tmp_path / "following", "recipe", "show", run / "resolved.yaml", after=(run,))
    cancelled = submit(tmp_path / "cancelled", "train", recipe)
    supervise.cancel(cancelled)
    supervise.start([run, following, cancelled])
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) < 3:
        assert time.monotonic() < deadline, main_log(run).read_text()
        time.sleep(0.02)
    owner = supervisor.of(run)
    assert owner is not None
    os.kill(owner.pid, signal.SIGUSR1)
    assert wait(following, "finished")[-2:] == ["started", "finished"]
    assert wait(run, "finished") == ["submitted", "started", "preempted", "requeued", "started", "finished"]
    assert "global_batch: 8" in main_log(following).read_text()
    ranks(2, "train", recipe, "--set", f"run_dir={tmp_path / 'straight'}")
    assert losses(run) == losses(tmp_path / "straight")
    for _ in range(100):
        if not supervisor.supervised(run):
            break
        time.sleep(0.1)
    assert not supervisor.supervised(run)
    assert [e.event for e in events(cancelled)] == ["submitted", "cancelled"]


def test_a_crash_loop_stops_and_so_does_what_comes_after_it(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ: os._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = submit(tmp_path / "run", "train", "any.yaml", processes=2)
    following = submit(tmp_path / "following", "train", "any.yaml", after=(run,))
    supervise.start([run, following])
    assert wait(run, "failed", "finished", seconds=20)
    assert wait(following, "stopped", "finished", seconds=30)[-1] == "stopped"
    found = events(run)
    assert [e.event for e in found] == ["submitted", *["started", "failed", "requeued"] * 2, "started", "failed"]
    assert "code 3, and 3 starts in a row brought it no further" in found[-1].reason
    assert events(following)[-1].reason == "run failed"


@pytest.mark.parametrize("how", ["cancel", "kill"])
def test_a_run_is_stopped_where_it_is(toy, tmp_path, how):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    run = submit(tmp_path / "run", "train", recipe, "--set", "train.steps=100000")
    supervise.start([run])
    while not (run / "metrics.jsonl").is_file():
        time.sleep(0.02)
    owner = supervisor.of(run)
    assert owner is not None
    if how == "cancel":
        supervise.cancel(run)
    else:
        os.kill(owner.pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while supervisor.supervised(run):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert events(run)[-1].event == ("cancelled" if how == "cancel" else "stopped")
    assert newest_step(run) == len(losses(run))


class _Scripted:
    """A rank that has ended with `code`, or (None) runs until it is killed."""

    def __init__(self, code: int | None):
        self.returncode = code

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None: ...

    def kill(self) -> None:
        self.returncode = -signal.SIGKILL


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ((2, None), ""),  # rank 0 has said why
        ((None, 2), "error: rank 1: b: no such folder\n"),
        ((3, None), "rank 1 of 2 did not end after the others: killed\n"),
    ],
)
def test_a_refused_start_says_the_user_s_error_alone(tmp_path, monkeypatch, codes, said):
    monkeypatch.setattr(local, "_GRACE", 0.1)
    began, left = now(), iter(codes)
    log = rank_log(tmp_path, 1)
    log.parent.mkdir()
    out = io.BytesIO()
    with local.Ranks(["true"], 2, tmp_path, main=out, start=lambda *_: _Scripted(next(left))) as found:
        log.write_text(f"rank 1 of 2 failed at {began}:\nerror: b: no such folder\n")
        assert found.wait() == max(code for code in codes if code)
    assert out.getvalue().decode() == said
