"""A run that is killed comes back as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from toy import write_recipe
from warm import Warm

from stamo_dist.exit_codes import EXIT_PREEMPTED


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in lines(run)]


def kill_at(warm: Warm, recipe: Path, step: int, sig: signal.Signals, processes: int) -> int:
    """Train, send `sig` to the launcher once `step` is logged, and return the exit code."""
    process = warm.start("train", recipe, "--nproc", processes)
    metrics = recipe.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, sig)
    return process.wait(timeout=120)


@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_killed_run_is_bit_identical(toy, stamo, warm, tmp_path, strategy):
    """Asked to stop once, then killed outright, on 2 processes with 2 loader workers, over an epoch boundary."""
    whole = write_recipe(tmp_path / "whole" / "toy.yaml", toy.shards, toy.vae, strategy=strategy, workers=2)
    stamo("train", whole, "--nproc", 2)

    broken = write_recipe(tmp_path / "broken" / "toy.yaml", toy.shards, toy.vae, strategy=strategy, workers=2)
    assert kill_at(warm, broken, 4, signal.SIGTERM, 2) == EXIT_PREEMPTED
    saved = sorted(p.name for p in (tmp_path / "broken/run/checkpoints").iterdir())
    assert len(saved) == 1
    assert 4 <= int(saved[0].removeprefix("step_")) < 20
    assert kill_at(warm, broken, 12, signal.SIGKILL, 2) == -signal.SIGKILL
    stamo("train", broken, "--nproc", 2)

    assert curve(tmp_path / "broken/run") == curve(tmp_path / "whole/run")
    weights = "run/model/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "broken" / weights).read_bytes()
