"""TensorBoard over resumed starts, the machine's use in the metrics, and what W&B leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import write_recipe

from stamo_dist.distributed.rank import World
from stamo_dist.errors import RunError
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.state import RunState
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.tracking.metrics import Reduced
from stamo_dist.tracking.tensorboard import check_installed

ROOT = Path(__file__).parents[2]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_each_step_once(toy: SimpleNamespace, ranks: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, run = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "run"
    command = ("train", recipe, "--set", "tracking.tensorboard=true", "--set", "train.checkpoint.every=2")
    command = (*command, "--set", "train.log_every=1")
    ranks(1, *command, "--set", "train.steps=4")
    shutil.rmtree(run / "checkpoints/step_00000004")
    ranks(1, *command, "--set", "train.steps=6")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("grad_norm")]
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found] == pytest.approx([line["grad_norm"] for line in lines(run)])
    assert "system/memory" in events.Tags()["scalars"]


def test_what_a_start_changed_is_in_the_metrics_of_its_first_step_also_after_going_back(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {sources: {a: {path: a}}}\ntrain: {steps: 20, log_every: 1}\n")
    logger = RunLogger(
        load(tmp_path / "r.yaml").recipe, {}, RunFolder(tmp_path), World(0, 1, 0, 1), ["a"], flops=None, step=10
    )
    state = RunState(cursor={}, samples=[0], skipped=[0])

    def log(step: int) -> None:
        times: dict[str, Any] = {"seconds": 1.0, "data_wait": 0.0, "comm_wait": 0.0, "compute_seconds": [1.0]}
        sums: dict[str, Any] = {"losses": {"flow": 1.0}, "per_source": {}, "shares": {}, "counts": [8], "skipped": [0]}
        reduced = Reduced(
            step=step, grad_norm=1.0, rates={}, peak_gb=0, reserved_gb=0, signals={}, not_finite=[], **times, **sums
        )  # fmt: skip
        logger.log_step(reduced, state)

    logger.note_changes({"optimizer.clip": ["1.0", "2.0"]})
    for step in (11, 12):
        log(step)
    logger.rewind(11)
    log(12)
    assert ["changed" in line for line in lines(tmp_path)] == [True, False]
    logger.rewind(10)
    log(11)
    assert lines(tmp_path)[0]["changed"] == {"optimizer.clip": ["1.0", "2.0"]}
    logger.close()


def test_without_the_package_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"tracking.tensorboard: needs the package tensorboard; .*pip install"):
        check_installed()


def test_wandb_leaves_nothing_in_the_system_s_temporary_folder(toy: SimpleNamespace, tmp_path: Path) -> None:
    recipe, temporary = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "stamo_dist.cli", "train", str(recipe)]
    command += ["--set", "train.steps=2", "--set", "train.log_every=1", "--set", "tracking.wandb=offline"]
    env = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(temporary.glob("*wandb*"))
    assert not (tmp_path / "run/wandb/tmp").exists()
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    for line in lines(tmp_path / "run"):
        assert 0 <= line["system/cpu"] <= 1
        assert 0 < line["system/memory"] < 1
        assert line["system/disk_free_gb"] > 0


def test_a_policy_s_process_does_not_import_wandb(tmp_path: Path) -> None:
    code = (
        "import os, sys, stamo_dist.models.openvla.policy\n"
        "print('wandb' in sys.modules, flush=True)\nimport wandb\nos._exit(0)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    alone = code.replace("import wandb\n", "")
    done = subprocess.run([sys.executable, "-c", alone], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n", done.stderr
    assert not list(tmp_path.glob("*wandb*"))
    again = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert again.stdout == "False\n", "and it can be imported afterwards"
