"""Cached latents train like online ones, and a missing or stale cache is refused."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from toy import write_recipe

STEPS = ("--set", "train.steps=4", "--set", "data.augment.brightness=0")


@pytest.fixture
def own(toy, tmp_path) -> SimpleNamespace:
    """The toy sources, copied, because the cache is written beside them."""
    shutil.copytree(toy.shards, tmp_path / "shards")
    return SimpleNamespace(recipe=write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", toy.vae), root=tmp_path)


def test_cached_latents_train_like_online_ones(stamo, own):
    def losses(name, *arguments):
        stamo("train", own.recipe, *STEPS, "--set", f"run_dir={own.root / name}", *arguments)
        return [json.loads(line)["loss"] for line in (own.root / name / "metrics.jsonl").read_text().splitlines()]

    missing = stamo("train", own.recipe, *STEPS, "--set", "data.latents=cached", check=False)
    assert missing.returncode == 2
    assert "run `stamo encode RECIPE`" in missing.stderr

    stamo("encode", own.recipe)
    assert "encoded 0 shards" in stamo("encode", own.recipe).stdout
    # The cache holds bfloat16: 8 bits of mantissa.
    assert losses("cached", "--set", "data.latents=cached") == pytest.approx(losses("online"), rel=2e-2)
