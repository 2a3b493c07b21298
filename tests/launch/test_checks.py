"""What `train`, `submit`, `doctor` and `recipe check` refuse of a recipe and its data: the same, all at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import make_source, write_recipe

from stamo_dist.data import at_hand
from stamo_dist.launch import checks
from stamo_dist.recipe.load import load


@pytest.fixture
def recipe(toy: SimpleNamespace, tmp_path: Path) -> Path:
    """Of two sources of its own: 32 px, 12 frames an episode, camera front, splits train and val."""
    for name in ("a", "b"):
        make_source(tmp_path / "shards", name, episodes=5)
    return write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", toy.vae)


WRONG = {
    "data.image_size=64": "has frames of 32 px, but data.image_size is 64",
    "data.sources.a.cameras=[frnt]": "{shards}/a: has no camera 'frnt', only front; did you mean front?",
    "data.sources.a.split=tset": "data.sources.a: {shards}/a: has no split 'tset', only train, val",
    "data.sources.b.path=nowhere": "data.sources.b: nowhere: no such folder",
    "data.horizon=40": "data.horizon: 40 frames, but the longest episode of all sources has 12",
}


@pytest.mark.parametrize("setting", WRONG)
def test_every_command_refuses_what_training_refuses(recipe: Path, stamo: Any, setting: str) -> None:
    expected = WRONG[setting].format(shards=recipe.parent / "shards")
    for command in (
        ("train", recipe),
        ("submit", recipe, "--cluster", "local", "--dry-run"),
        ("doctor", recipe, "--no-job", "--json"),
        ("recipe", "check", recipe),
    ):
        done = stamo(*command, "--set", setting, check=False)
        assert done.returncode == (1 if command[0] == "doctor" else 2), command
        assert expected in done.stdout + done.stderr, command
    assert not (recipe.parent / "run").exists()
    assert stamo("recipe", "check", recipe, "--offline", "--set", setting).stdout.startswith("OK")


def test_a_damaged_shard_and_a_batch_that_does_not_divide_are_said_together(recipe: Path) -> None:
    shard = recipe.parent / "shards" / "a" / "train" / "front" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:100])
    (recipe.parent / "shards" / "b" / "train" / "episodes.jsonl").unlink()
    problems = checks.look(load(recipe), world_size=7).problems
    assert len(problems) == 3
    for problem, expected in zip(
        problems,
        ("not divisible by 7", "shard.00000.mds (100 bytes, index.json says", "episodes.jsonl: missing"),
        strict=True,
    ):
        assert problem.startswith(f"{recipe}:")
        assert expected in problem
    assert all("`stamo data convert` with the same arguments makes it anew" in problem for problem in problems[1:])


def test_a_warm_up_longer_than_the_run_is_noted(recipe: Path) -> None:
    looked = checks.look(load(recipe, ["optimizer.warmup_steps=500", "train.steps=20"]))
    assert looked.problems == []
    assert looked.notes == [
        "optimizer.warmup_steps: 500 steps of warm-up in a run of 20: it never reaches optimizer.lr"
    ]
    assert checks.look(load(recipe, ["optimizer.warmup_steps=5", "train.steps=20"])).notes == []
    wsd = ["optimizer.schedule=wsd", "optimizer.decay_steps=15", "train.steps=20"]
    assert checks.look(load(recipe, [*wsd, "optimizer.warmup_steps=5"])).notes == []
    assert checks.look(load(recipe, [*wsd, "optimizer.warmup_steps=8"])).notes == [
        "optimizer.decay_steps: 15 are more than the 12 steps after the warm-up: it is shorter"
    ]


def test_a_pipeline_is_no_recipe(stamo: Any) -> None:
    for command in (("recipe", "check"), ("train",)):
        refused = stamo(*command, "recipes/pipelines/demo.yaml", check=False)
        assert refused.returncode == 2
        assert "is a pipeline, no recipe: `stamo submit recipes/pipelines/demo.yaml" in refused.stderr


def test_a_folder_that_is_no_source_says_what_it_is(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        data = load("recipes/tokenizer_demo.yaml", [f"data.sources.libero.path={path}"]).recipe.data
        return next(misfit.text for misfit in at_hand.look(data) if misfit.text.startswith("data.sources.libero:"))

    dataset = tmp_path / "dataset"
    dataset.mkdir()
    assert "is empty; convert a dataset into it" in said(dataset)
    (dataset / "demo.hdf5").write_bytes(b"x")
    assert "a dataset itself is not read: convert it into another folder" in said(dataset)
    (tmp_path / ".half.partial").mkdir()
    assert "its conversion never finished; run the same `stamo data convert` again, it resumes" in said(
        tmp_path / "half"
    )


def test_what_has_to_be_encoded_first_is_said(recipe: Path, stamo: Any) -> None:
    cached = ("--set", "data.latents=cached", "--set", "data.augment.brightness=0")
    shards = recipe.parent / "shards"
    said = stamo("recipe", "check", recipe, *cached).stdout
    assert f"there are no latents beside {shards}/a, {shards}/b; `stamo encode` first" in said
    (shards / "a" / "train" / "front" / "latents-0123456789abcdef").mkdir()
    said = stamo("recipe", "check", recipe, *cached).stdout
    assert f"there are no latents beside {shards}/b; `stamo encode` first" in said
    assert "latents beside" not in stamo("recipe", "check", recipe).stdout
