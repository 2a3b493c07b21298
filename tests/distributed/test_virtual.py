"""With virtual workers the number of processes changes nothing, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from toy import write_recipe


def told(run: Path) -> list[dict]:
    """What the run logged, but for what measures time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k == "grad_norm" or k.startswith("loss")} for line in lines]


def test_any_number_of_processes_trains_the_same_bits(toy, ranks, tmp_path):
    """On 1, 2 and 4 processes, and on 2, then 4, then 1; micro-batches of 1 among 4 virtual workers."""
    settings = ("train.virtual_workers=4", "train.micro_batch=1", "train.checkpoint.keep=9", "train.ema=0.9")
    found = {}

    def train(name: str, processes: int) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        recipe = write_recipe(folder / "toy.yaml", toy.shards, toy.vae, strategy="ddp")
        ranks(processes, "train", recipe, *(x for s in settings for x in ("--set", s)))
        weights = folder / "run/model/transformer/diffusion_pytorch_model.safetensors"
        found[name, processes] = told(folder / "run"), weights.read_bytes()
        return folder / "run/checkpoints"

    for processes in (1, 2, 4):
        train("whole", processes)
        if processes < 4:
            shutil.rmtree(tmp_path / "whole")
    checkpoints = train("changed", 2)
    shutil.rmtree(checkpoints / "step_00000020")
    train("changed", 4)
    shutil.rmtree(checkpoints / "step_00000020")
    train("changed", 1)
    first = found["whole", 1]
    assert len(first[0]) == 20
    assert all(other == first for other in found.values())


def test_what_cannot_be_is_refused(toy, stamo, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae, strategy="zero2")
    result = stamo("train", recipe, "--set", "train.virtual_workers=6", check=False)
    assert result.returncode == 2
    assert "train.virtual_workers: needs strategy.name: ddp, not zero2" in result.stderr
    assert "6 is not a power of two that divides train.global_batch (8)" in result.stderr
    settings = ("--set", "strategy.name=ddp", "--set", "train.virtual_workers=4")
    result = stamo("train", recipe, *settings, "--nproc", 8, check=False)
    assert result.returncode == 2
    assert "4 cannot be shared by 8 processes; it runs on 1, 2, 4" in result.stderr
    assert not (tmp_path / "run").exists()
