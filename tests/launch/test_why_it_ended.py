"""What status says of runs that ended otherwise than they should: by hand, with an error, or refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from stamo_dist.cli import steer
from stamo_dist.errors import RunError
from stamo_dist.launch.status import Run, collect
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
