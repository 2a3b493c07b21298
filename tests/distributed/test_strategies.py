"""Every strategy trains the same model: same seed, same global batch, same losses on 1 and on 2 processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy import write_recipe


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(toy, stamo, tmp_path_factory) -> list[float]:
    recipe = write_recipe(tmp_path_factory.mktemp("reference") / "toy.yaml", toy.shards, toy.vae, strategy="ddp")
    stamo("train", recipe)
    return losses(recipe.parent / "run")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"])
def test_same_losses(toy, stamo, tmp_path, reference, strategy, processes):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae, strategy=strategy)
    done = stamo("train", recipe, "--nproc", processes)
    assert "Warning" not in done.stdout + done.stderr
    assert len(reference) == 20
    assert reference[-1] < reference[0]
    assert losses(tmp_path / "run") == pytest.approx(reference, rel=1e-5)


def test_world_size_that_does_not_divide_is_refused(toy, stamo, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    result = stamo("train", recipe, "--nproc", 3, check=False)
    assert result.returncode == 2
    assert "8 is not divisible by 3 processes; it runs on 1, 2, 4, 8" in result.stderr
    assert not (tmp_path / "run").exists()
