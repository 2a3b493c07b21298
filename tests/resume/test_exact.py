"""The second part of a run can be run again, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from toy import write_recipe


def curve(run: Path) -> list[dict]:
    """Every logged value but those that measure time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            k: v
            for k, v in line.items()
            if k in ("step", "loss", "grad_norm", "lr") or k.startswith(("loss/", "samples/"))
        }
        for line in lines
    ]


@pytest.mark.parametrize(("strategy", "workers", "step"), [("ddp", 2, 6), ("zero1", 0, 12), ("zero3", 2, 18)])
def test_running_again_from_a_checkpoint_changes_nothing(toy, ranks, tmp_path, strategy, workers, step):
    """On 2 processes, in the first epoch and beyond it, with an average, from weighted sources."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae, strategy=strategy, workers=workers)
    run = tmp_path / "run"
    settings = [
        "train.checkpoint.every=6", "train.checkpoint.keep=9", "train.ema=0.9", "model.compressor.standardise=16",
    ]  # fmt: skip
    arguments = [2, "train", recipe, *(x for s in settings for x in ("--set", s))]
    ranks(*arguments)
    weights = run / "model/transformer/diffusion_pytorch_model.safetensors"
    before, exported = curve(run), weights.read_bytes()
    for later in (run / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    assert f"after step {step}" in ranks(*arguments)[1]
    assert curve(run) == before
    assert len(before) == 20
    assert weights.read_bytes() == exported
