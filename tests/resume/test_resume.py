"""A run that is killed comes back as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import write_recipe

from stamo_dist.engine.preempt import EXIT_PREEMPTED


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in lines(run)]


def kill_at(recipe: Path, step: int, sig: signal.Signals, processes: int) -> int:
    """Train, send `sig` to the launcher once `step` is logged, and return the exit code."""
    command = [sys.executable, "-m", "stamo_dist.cli", "train", str(recipe), "--nproc", str(processes)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = recipe.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, sig)
    return process.wait(timeout=120)


@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_killed_run_is_bit_identical(toy, stamo, tmp_path, strategy):
    """Asked to stop once, then killed outright, on 2 processes with 2 loader workers, over an epoch boundary."""
    whole = write_recipe(tmp_path / "whole" / "toy.yaml", toy.shards, toy.vae, strategy=strategy, workers=2)
    stamo("train", whole, "--nproc", 2)

    broken = write_recipe(tmp_path / "broken" / "toy.yaml", toy.shards, toy.vae, strategy=strategy, workers=2)
    assert kill_at(broken, 4, signal.SIGTERM, 2) == EXIT_PREEMPTED
    saved = sorted(p.name for p in (tmp_path / "broken/run/checkpoints").iterdir())
    assert len(saved) == 1
    assert 4 <= int(saved[0].removeprefix("step_")) < 20
    assert kill_at(broken, 12, signal.SIGKILL, 2) == -signal.SIGKILL
    stamo("train", broken, "--nproc", 2)

    assert curve(tmp_path / "broken/run") == curve(tmp_path / "whole/run")
    weights = "run/model/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "broken" / weights).read_bytes()


@pytest.fixture(scope="module")
def finished(toy, stamo, tmp_path_factory) -> Path:
    """A finished run of one process; returns its recipe."""
    recipe = write_recipe(tmp_path_factory.mktemp("finished") / "toy.yaml", toy.shards, toy.vae, strategy="zero2")
    stamo("train", recipe)
    return recipe


@pytest.fixture
def run_copy(finished, tmp_path) -> Path:
    """The recipe of a private copy of the finished run."""
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(finished.read_text().replace(str(finished.parent), str(tmp_path)))
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    return recipe


def test_truncated_checkpoint_is_named_and_the_one_before_is_used(stamo, run_copy):
    run = run_copy.parent / "run"
    before = curve(run)
    newest = run / "checkpoints" / "step_00000020"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with victim.open("r+b") as f:
        f.truncate(victim.stat().st_size // 2)
    output = stamo("train", run_copy).stdout
    assert f"skipped {newest}: missing or truncated: {victim.relative_to(newest)}" in output
    assert "after step 10" in output
    assert curve(run) == before


def test_half_written_checkpoint_is_never_loaded(stamo, run_copy):
    checkpoints = run_copy.parent / "run" / "checkpoints"
    (checkpoints / "step_00000020" / "checkpoint.json").unlink()
    (checkpoints / "step_00000010").rename(checkpoints / ".step_00000010.tmp")
    assert "continuing" not in stamo("train", run_copy).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.sources.a.weight=5"], "was trained on another mixture"),
        (["--nproc", "2", "--set", "train.steps=30"], "written by zero2 with world size 1 and cannot continue"),
        (["--resume", "none"], "holds step_00000020"),
        (["--resume", "/nowhere"], "/nowhere: no valid checkpoint.json"),
    ],
)
def test_refusals(stamo, run_copy, arguments, message):
    before = (run_copy.parent / "run" / "metrics.jsonl").read_bytes()
    result = stamo("train", run_copy, *arguments, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert (run_copy.parent / "run" / "metrics.jsonl").read_bytes() == before


def test_finished_run_is_left_alone(stamo, run_copy):
    assert "already trained to step 20" in stamo("train", run_copy).stdout
