"""Cached latents train like online ones, and a missing or stale cache is refused."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu
from toy import write_recipe

from stamo_dist import device
from stamo_dist.distributed.rank import World
from stamo_dist.encode import encode
from stamo_dist.recipe.load import load

STEPS = ("--set", "train.steps=4", "--set", "data.augment.brightness=0")


@pytest.fixture
def own(toy, tmp_path) -> SimpleNamespace:
    """The toy sources, copied, because the cache is written beside them."""
    shutil.copytree(toy.shards, tmp_path / "shards")
    return SimpleNamespace(recipe=write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", toy.vae), root=tmp_path)


def test_a_gpu_encodes_in_bf16_from_page_locked_memory(own, monkeypatch):
    recipe, gpu, found = load(own.recipe).recipe, FakeGpu(), []
    for on in (device.CPU, gpu):
        monkeypatch.setattr(device, "_current", on)
        shards = encode(recipe, World(0, 1, 0, 1))
        files = sorted((own.root / "shards").rglob("latents-*/*.npy"))
        assert len(files) == shards > 0
        bits = np.concatenate([np.load(file) for file in files]).view(np.int16)
        found.append(torch.from_numpy(bits).view(torch.bfloat16).float())
        for file in files:
            shutil.rmtree(file.parent, ignore_errors=True)
    assert gpu.cuda.selected == [0]
    assert gpu.cuda.said["pin"] >= shards, "each batch of frames"
    assert not torch.equal(*found), "computed in fp32 on a CPU"
    assert torch.allclose(*found, rtol=0.1, atol=0.05)


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
