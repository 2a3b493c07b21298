"""A policy resumes exactly, and not on other statistics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from toy_policy import make_base, on_base, write_policy_recipe


def curve(run: Path) -> list[dict]:
    """Every logged value but those that measure time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "action", "world_mse", "world_l1", "grad_norm", "lr", "samples")
    return [{k: v for k, v in line.items() if k.partition("/")[0] in kept} for line in lines]


@pytest.mark.parametrize(("strategy", "actions"), [("fsdp", "tokens"), ("ddp", "regression")])
def test_running_again_from_a_checkpoint_changes_nothing(toy_policy, ranks, tmp_path, strategy, actions):
    recipe = write_policy_recipe(tmp_path / "toy.yaml", toy_policy, strategy=strategy, actions=actions, proprio=True)
    run = tmp_path / "run"
    ranks(2, "train", recipe)
    files = sorted(p for p in (run / "model").iterdir() if p.suffix == ".safetensors")
    before, exported = curve(run), [p.read_bytes() for p in files]
    shutil.rmtree(run / "checkpoints/step_00000012")
    assert "after step 6" in ranks(2, "train", recipe)[1]
    assert curve(run) == before
    assert len(before) == 12
    assert [p.read_bytes() for p in files] == exported


def test_dropout_draws_the_same_after_a_restart(toy_policy, ranks, tmp_path):
    base = make_base(tmp_path / "base")
    recipe = on_base(write_policy_recipe(tmp_path / "toy.yaml", toy_policy, actions="regression", proprio=True), base)
    settings = ["policy.lora={rank: 4, dropout: 0.5}", "train.steps=6", "train.checkpoint.every=2"]
    words = [word for s in settings for word in ("--set", s)]
    ranks(1, "train", recipe, *words)
    before = curve(tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/step_0000000{step}")
    assert "after step 2" in ranks(1, "train", recipe, *words)[1]
    assert curve(tmp_path / "run") == before
    ranks(1, "train", recipe, *words, "--set", f"run_dir={tmp_path}/none", "--set", "policy.lora.dropout=0")
    assert curve(tmp_path / "none")[1] != before[1], "there is something to draw"


def test_other_statistics_are_another_model(toy_policy, ranks, tmp_path):
    shutil.copytree(toy_policy / "shards", tmp_path / "shards")
    recipe = write_policy_recipe(tmp_path / "toy.yaml", toy_policy)
    settings = ["--set", f"data.sources.a.path={tmp_path}/shards/a", "--set"]
    ranks(1, "train", recipe, *settings, "train.steps=2")
    path = tmp_path / "shards/a/manifest.json"
    path.write_text(path.read_text().replace("10.0", "9.0"))
    code, said = ranks(1, "train", recipe, *settings, "train.steps=4", check=False)
    assert code == 2
    assert "another model" in said
    assert "model.statistics.a" in said
