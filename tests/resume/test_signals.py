"""Signals and hung ranks, on 2 processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from toy import write_recipe
from warm import Started, Warm

from stamo_dist.exit_codes import EXIT_INTERRUPTED, EXIT_PREEMPTED
from stamo_dist.faults.heartbeats import hung_ranks
from stamo_dist.launch.status import collect


class Run:
    """A training of 2 processes that would go on for long; `warm` spares it the time that imports take."""

    def __init__(self, recipe: Path, warm: Warm | None, *settings: str):
        self.folder = recipe.parent / "run"
        self.log = recipe.parent / "log"
        command = ["train", str(recipe), "--nproc", "2"]
        command += [x for s in ("train.steps=100000", "train.checkpoint.every=100000", *settings) for x in ("--set", s)]
        if warm:
            self.launcher: Started | subprocess.Popen[bytes] = warm.start(*command, stdout=self.log)
            return
        command = [sys.executable, "-m", "stamo_dist.cli", *command]
        with self.log.open("w") as out:
            self.launcher = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def reach(self, step: int) -> None:
        """Wait until `step` is logged."""
        metrics = self.folder / "metrics.jsonl"
        self.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= step)

    def hang(self) -> None:
        """Wait until no step is logged for a second and a half: the steps that a rank had a part in are done."""
        seen, metrics = -1, self.folder / "metrics.jsonl"
        while seen != (seen := len(metrics.read_text().splitlines())):
            time.sleep(1.5)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.launcher.poll() is None, f"the run ended too early:\n{self.output}"
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def rank(self, rank: int) -> psutil.Process:
        ranks = sorted(psutil.Process(self.launcher.pid).children(), key=lambda p: (p.create_time(), p.pid))
        assert len(ranks) == 2
        return ranks[rank]


@pytest.fixture
def start(toy, warm, tmp_path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*settings: str, imports: bool = False, **recipe: object) -> Run:
        written = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae, **recipe)
        runs.append(Run(written, None if imports else warm, *settings))
        return runs[-1]

    yield begin
    for run in runs:
        if run.launcher.poll() is None:
            for child in psutil.Process(run.launcher.pid).children(recursive=True):
                child.kill()
            run.launcher.kill()
        run.launcher.wait()


def test_two_signals_to_one_rank_are_one_request(start):
    """All ranks save and leave; the log says who was asked, by what, when and for how long; the next start knows it."""
    run = start("train.checkpoint.grace_seconds=0.01", workers=1)
    run.reach(3)
    rank = run.rank(1)
    rank.send_signal(signal.SIGUSR1)
    time.sleep(0.01)
    rank.send_signal(signal.SIGTERM)
    assert run.launcher.wait(timeout=120) == EXIT_PREEMPTED, run.output
    saved = list((run.folder / "checkpoints").glob("step_*"))
    assert len(saved) == 1
    assert f"SIGUSR1 on rank 1: saved {saved[0]} in " in run.output
    assert "SIGTERM" not in run.output
    assert "but the cluster gives 0.01 s" in run.output


def test_signal_before_the_first_step_is_kept(start):
    """SIGUSR2 while the ranks still import would end them; they save after their first steps instead."""
    run = start(imports=True)
    run.until(lambda: len(psutil.Process(run.launcher.pid).children()) == 2)
    run.launcher.send_signal(signal.SIGUSR2)
    assert run.launcher.wait(timeout=120) == EXIT_PREEMPTED, run.output
    assert f"SIGUSR2 on rank 0, 1: saved {run.folder}/checkpoints/step_00000002 in " in run.output


ORPHAN = """
import os, signal, time
from stamo_dist.distributed.rank import world_from_environment
launcher = os.getpid()
os.environ.update(RANK="0", WORLD_SIZE="1", STAMO_LAUNCHED=str(launcher))
if os.fork():
    os.kill(launcher, signal.SIGKILL)
while os.getppid() == launcher:
    time.sleep(0.01)
print("late", flush=True)
world_from_environment()
print("not reached", flush=True)
"""


def test_launcher_killed_while_its_ranks_start():
    """They have not asked the kernel yet to be told of its end: they find out by themselves."""
    command = [sys.executable, "-c", ORPHAN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        said = launcher.communicate(timeout=30)[0]
    assert said == "late\nrank 0: what started it has been killed\n"


def test_launcher_killed_before_it_has_started_all_ranks(start):
    """The one that runs would wait for the other for hours."""
    run = start(imports=True)
    run.until(lambda: sum("RANK" in p.environ() for p in psutil.Process(run.launcher.pid).children()) == 2)
    first, second = (run.rank(rank) for rank in range(2))
    second.suspend()  # as if it were not there: it has not met the first yet
    time.sleep(5)  # by now the first waits for it
    run.launcher.kill()
    _, left = psutil.wait_procs([first], timeout=10)
    second.kill()
    assert not left


@pytest.mark.parametrize("hung", [0, 1])
def test_hung_rank_is_named_and_the_run_leaves_to_be_started_again(start, hung):
    run = start("train.step_timeout=3", "train.dry_export=false")  # no save comes between
    run.reach(3)
    run.rank(hung).suspend()
    assert run.launcher.wait(timeout=60) == EXIT_PREEMPTED, run.output
    said = run.output if hung else (run.folder / "logs" / "rank_00001.log").read_text()
    assert f"the run is hung: no progress for 3 s (train.step_timeout): rank {hung} no longer answers" in said
    stack = (run.folder / "logs" / f"stack_rank_{1 - hung:05d}.txt").read_text()
    assert "in _train" in stack
    assert "for 0 s" not in stack
    assert f"rank {hung} of 2 did not end after the others: killed" in run.output
    assert hung_ranks(run.folder / "logs") == [hung], "for the launcher, that has the next start stay off its node"


def test_a_file_system_that_hangs_while_data_are_opened(start, toy, tmp_path):
    shards = shutil.copytree(toy.shards, tmp_path / "shards")
    index = next((shards / "a" / "train").glob("*/index.json"))
    index.unlink()
    os.mkfifo(index)  # nobody ever writes to it
    run = start(f"data.sources.a.path={shards / 'a'}", "train.setup_timeout=5")
    assert run.launcher.wait(timeout=90) == EXIT_PREEMPTED, run.output
    assert "is hung: building for step 1" in run.output
    assert "(train.setup_timeout: 5)" in run.output
    assert hung_ranks(run.folder / "logs") == []


def test_a_rank_that_lost_its_launcher_and_whose_peer_is_stuck_ends_itself(start):
    """Nobody is left who would end it, and it is asked to save, which it cannot without the other."""
    run = start()
    run.reach(3)
    first, second = (run.rank(rank) for rank in range(2))
    second.suspend()
    run.launcher.kill()
    _, left = psutil.wait_procs([first], timeout=60)
    second.resume()  # it finds its peer gone
    assert not left
    _, left = psutil.wait_procs([second], timeout=60)
    assert not left
    assert "what started it is gone, and it got no further" in run.output


def test_a_second_sigterm_ends_a_rank_that_cannot_save(start):
    run = start()
    run.reach(2)
    rank, other = run.rank(0), run.rank(1)
    other.suspend()
    run.hang()
    rank.terminate()
    time.sleep(5.2)  # a scheduler's one comes by several ways
    assert rank.is_running()
    rank.terminate()
    run.until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE)
    other.kill()
    assert run.launcher.wait(timeout=60) == EXIT_PREEMPTED, run.output
    assert "rank 0: a second SIGTERM: leaving with code 75" in run.output


def test_second_sigint_stops_at_once_even_a_hung_rank(start):
    run = start()
    run.reach(2)
    rank, other = run.rank(0), run.rank(1)
    other.suspend()
    run.hang()
    os.kill(rank.pid, signal.SIGINT)
    time.sleep(0.3)
    assert rank.is_running()
    began = time.monotonic()
    os.kill(rank.pid, signal.SIGINT)
    run.until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE)
    assert time.monotonic() - began < 2
    other.kill()
    assert run.launcher.wait(timeout=60) == EXIT_INTERRUPTED, run.output
    assert not list((run.folder / "checkpoints").glob("step_*"))
    [found] = collect([run.folder])
    assert (found.state.word, found.state.detail.partition(" at step ")[0]) == ("stopped", "by hand (Ctrl-C twice)")
    assert "`stamo resume" not in found.state.detail
