"""The VAE's convolutions lie channels-last: every strategy trains them, saves, goes on and exports."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import write_recipe


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_strategy_trains_the_vae(toy: SimpleNamespace, ranks: Any, tmp_path: Path) -> None:
    found = {}
    for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"):
        recipe = write_recipe(tmp_path / strategy / "toy.yaml", toy.shards, toy.vae, strategy=strategy)
        command = ("train", recipe, "--set", "stage=vae", "--set", "train.checkpoint.every=2")
        if strategy in ("zero3", "fsdp"):  # and go on, on another number of processes
            ranks(1, *command, "--set", "train.steps=2")
        ranks(2, *command, "--set", "train.steps=4", compare=strategy != "ddp")
        run = tmp_path / strategy / "run"
        assert (run / "model/diffusion_pytorch_model.safetensors").is_file()
        found[strategy] = losses(run)
    assert len(found["ddp"]) == 4
    for strategy, those in found.items():
        assert those == pytest.approx(found["ddp"], rel=1e-5), strategy
