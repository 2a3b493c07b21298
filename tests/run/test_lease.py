"""Two writers in one run folder: the second waits or refuses, a dead one is replaced, a cut-off one is fenced off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from stamo_dist.distributed.rank import World
from stamo_dist.errors import RunError
from stamo_dist.recipe.training import Train
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.lease import FOLDER, FencedError, Owner, acquire, nothing_if_refused
from stamo_dist.run.state import RunState
from stamo_dist.tracking.metrics_file import MetricsFile
from stamo_dist.training.divergence import roll_back

HOLD = """
import sys, time
from pathlib import Path
from stamo_dist.run.lease import acquire
g = acquire(Path(sys.argv[1]))
print(g.number, flush=True)
time.sleep(60)
"""


@contextmanager
def held(run: Path, **environment: str):
    """Another process that trains in `run`."""
    env = {**os.environ, **environment}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True, env=env) as p:
        try:
            assert p.stdout is not None
            p.stdout.readline()
            yield p
        finally:
            p.kill()


def refuse(run: RunFolder) -> None:
    """A start that a user's error ends."""
    with suppress(RunError), nothing_if_refused(run.path):
        run.prepare()
        with acquire(run.path):
            raise RunError


def test_a_refused_first_start_leaves_nothing_and_takes_nothing_of_another_s(tmp_path):
    run = RunFolder(tmp_path / "runs/new")
    refuse(run)
    assert not run.path.parent.exists()
    run.logs.mkdir(parents=True)
    (run.logs / "rank_00001.log").touch()  # the launcher's, which removes it
    refuse(run)
    assert [path.name for path in run.path.rglob("*")] == ["logs", "rank_00001.log"]
    with acquire(run.path):
        pass
    refuse(run)
    assert (run.path / FOLDER / "00000002.end").exists(), "of a run that there is, why a start failed is kept"
    with acquire(tmp_path / "described"):
        RunFolder(tmp_path / "described").resolved.touch()
    shutil.rmtree(tmp_path / "described" / FOLDER)
    refuse(RunFolder(tmp_path / "described"))
    assert (tmp_path / "described" / FOLDER / "00000001.end").exists()


def test_a_living_run_is_left_alone_and_a_dead_one_replaced(tmp_path):
    with held(tmp_path) as other:
        with pytest.raises(RunError, match=f"process {other.pid} on .* is still training here"):
            acquire(tmp_path, patience=0.3)
        other.send_signal(signal.SIGKILL)
        other.wait()
        with acquire(tmp_path, patience=0.3) as mine:
            assert mine.number == 2
            assert mine.notes == [f"{Owner(**json.loads((tmp_path / FOLDER / '00000001').read_text()))} was training "
                                  "here and is dead: took over"]  # fmt: skip
            with pytest.raises(RunError, match="still training"):
                acquire(tmp_path, patience=0.1)
    with acquire(tmp_path, patience=0) as after:
        assert after.number == 3
        assert after.notes == []  # an orderly end is no death


def test_a_machine_that_fell_silent_does_not_hold_the_folder(tmp_path):
    file = tmp_path / FOLDER / "00000007"
    file.parent.mkdir()
    other = replace(Owner.this(), node="node7", boot="another", pid=1)
    file.write_text(json.dumps(asdict(other)))
    alive = threading.Event()

    def beat() -> None:
        while not alive.wait(0.05):
            file.touch()

    heart = threading.Thread(target=beat)
    heart.start()
    with pytest.raises(RunError, match=r"process 1 on node7 is still training here"):
        acquire(tmp_path, patience=0.1, stale=1.0)
    alive.set()
    heart.join()
    os.utime(file, (time.time() - 100, time.time() - 100))
    with acquire(tmp_path) as mine:
        assert mine.number == 8
        assert "process 1 on node7 was training here and has been silent for 100 s" in mine.notes[0]


def test_the_scheduler_s_restart_fences_off_the_rank_that_was_cut_off(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with acquire(tmp_path) as cut_off:
        metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, cut_off.check)
        metrics.write({"step": 1})
        with pytest.raises(RunError):
            acquire(tmp_path, patience=0)  # no restart: a second run
        with held(tmp_path, SLURM_RESTART_COUNT="1"):
            with pytest.raises(FencedError, match="has taken the folder over"):
                cut_off.check()
            with pytest.raises(FencedError):
                metrics.write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_rank_that_was_cut_off_rolls_nothing_back(tmp_path, monkeypatch):
    """It would rename the newer start's checkpoints, and make it pass over batches."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    engine = SimpleNamespace(world=World(rank=0, size=1, local_rank=0, local_size=1))
    run, train = RunFolder(tmp_path), Train(steps=20)
    with acquire(tmp_path) as cut_off, held(tmp_path, SLURM_RESTART_COUNT="1"), pytest.raises(FencedError):
        roll_back(run, None, engine, None, RunState(step=9, bad_in_a_row=3), train, cut_off.check)
    assert not run.bad_batches.exists()


def test_a_start_of_the_version_before_and_one_of_this_fence_each_other_off(tmp_path):
    with acquire(tmp_path):
        pass
    with acquire(tmp_path) as mine:
        assert (mine.number, (tmp_path / ".leases/00000002").exists()) == (2, True)
        earlier = tmp_path / ".generations"  # which the version before makes, as it looks nowhere else
        earlier.mkdir()
        (earlier / "00000001").write_text(json.dumps({**asdict(Owner.this()), "ended": True}))
        with pytest.raises(FencedError, match="has taken the folder over"):
            mine.check()
    (tmp_path / ".leases/00000002").write_text(json.dumps({**asdict(Owner.this()), "ended": True}))
    with acquire(tmp_path) as next_:
        assert (next_.number, (earlier / "00000003").exists()) == (3, True)
