"""Action dimensions that never or seldom move: what the policy is taught, what it says, and what it gives back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import make_source
from toy_policy import TEXTS, write_diffusion_recipe, write_policy_recipe

from stamo_dist.data.mixture import Mixture
from stamo_dist.data.schema import MANIFEST
from stamo_dist.models.openvla.actions import Statistics, ValueRange
from stamo_dist.models.policies import load_policy
from stamo_dist.recipe.load import load
from stamo_dist.tasks import build_task

#: A released file's column: a gripper that never moves, outside the mask, and another constant within it.
STILL = {
    "min": [-2.0, 1.0, 0.25], "max": [2.0, 1.0, 0.25], "q01": [-1.0, 1.0, 0.25], "q99": [1.0, 1.0, 0.25],
    "mask": [True, False, True],
}  # fmt: skip


@pytest.mark.parametrize("bounds", ["q99", "minmax"])
@pytest.mark.parametrize("epsilon", [False, True])
def test_a_constant_comes_back_whatever_the_network_says(bounds: Any, epsilon: bool) -> None:
    found = Statistics({"a": {"action": STILL}}, "released.json").range("a", "action", bounds)
    assert found.normalise(np.array([0.0, 1.0, 0.25])).tolist() == [pytest.approx(0, abs=1e-8), 0, 0]
    for said in (-1.0, 0.0, 0.4, 1.0):
        assert found.restore(np.array([0.0, said, said]), epsilon)[1:].tolist() == pytest.approx([1.0, 0.25], abs=1e-7)


def test_quantiles_alone_do_not_make_a_gripper_constant() -> None:
    seldom = {"q01": [0.0, 1.0], "q99": [2.0, 1.0], "mask": [True, False]}
    assert ValueRange.from_statistics(seldom, "q99", "here").restore(np.array([0.0, 0.3]), False).tolist() == [1.0, 0.3]


def test_noise_of_a_constant_sensor_is_no_signal() -> None:
    felt = Statistics({"a": {"proprio": STILL}}, "here").range("a", "proprio")
    assert felt.normalise_proprio(np.array([[0.0, 1.0, 0.25 + 1e-7]]))[0, 2] == -1
    assert felt.normalise_proprio(np.array([[0.0, 1.0, 0.5]]))[0, 2] == 1  # as the official code has it


def action(episode: int, t: int) -> list[float]:
    """One that moves, one that never does, and one that does in a single frame of all."""
    return [t, 1.0, 5.0 if (episode, t) == (3, 7) else 2.0]


@pytest.fixture(scope="module")
def still(toy_policy: Path, tmp_path_factory: pytest.TempPathFactory, stamo: Callable[..., Any]) -> Path:
    """A policy's data whose source `a` has such actions, with the statistics that the command keeps."""
    root = tmp_path_factory.mktemp("still")
    source = make_source(root / "shards", "a", length=60, shard_bytes=1 << 20, action=action)
    (root / "shards/b").symlink_to(toy_policy / "shards/b")
    (root / "tokenizer").symlink_to(toy_policy / "tokenizer")
    printed = stamo("data", "stats", source).stdout
    assert "action 1 (always 1): never changes; a policy gives it back as it was" in printed
    assert "action 2 (2, from 2 to 5): moves in so few frames that q01 is q99" in printed
    # The gripper of most datasets is outside the mask.
    manifest = json.loads((source / MANIFEST).read_text())
    assert manifest["stats"]["action"]["q99"][2] == pytest.approx(2.0, rel=1e-3)
    manifest["stats"]["action"]["mask"] = [True, False, True]
    (source / MANIFEST).write_text(json.dumps(manifest))
    return root


@pytest.mark.parametrize("kind", ["tokens", "parallel_tokens", "regression", "diffusion"])
@pytest.mark.parametrize("bounds", ["q99", "minmax"])
def test_every_policy_gives_constants_back(kind: str, bounds: str, still: Path, tmp_path: Path) -> None:
    if kind == "diffusion":
        path = write_diffusion_recipe(tmp_path / "toy.yaml", still, proprio=False)
    else:
        path = write_policy_recipe(tmp_path / "toy.yaml", still, actions=kind)
    recipe = load(path, [f"policy.bounds={bounds}", f"data.sources.a.instruction={TEXTS[0]}"]).recipe
    task = build_task(recipe, Mixture(recipe.data, seed=0, global_batch=8))
    assert any("a: action 1 (always 1)" in note for note in task.notes)
    assert any("a: action 2 (2, from 2 to 5)" in note for note in task.notes)
    task.export(tmp_path / "model", dict(task.trained.state_dict()), [])
    statistics = json.loads((tmp_path / "model/dataset_statistics.json").read_text())["a"]["action"]
    assert (statistics["q01"][2], statistics["q99"][2]) == (2.0, 5.0), "what the official code reads, too"

    policy = load_policy(tmp_path / "model")
    frame = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    chunk = policy.act(frame, TEXTS[0])
    assert chunk[:, 1].tolist() == [1.0, 1.0]
    assert ((chunk[:, 2] >= 2) & (chunk[:, 2] <= 5)).all()
    assert (np.abs(chunk[:, 2] - 2) > 1e-6).any(), "it can move"


def test_the_recipes_check_names_them_and_what_could_be_cached(
    still: Path, tmp_path: Path, stamo: Callable[..., Any]
) -> None:
    path = write_diffusion_recipe(tmp_path / "toy.yaml", still)
    printed = stamo("recipe", "check", path).stdout
    assert "data.sources.a: action 1 (always 1): never changes" in printed
    assert "data.sources.a: action 2 (2, from 2 to 5): moves in so few frames" in printed
    # 12 steps of 8 samples, each with the frame it sees and the one it leads to, of 240 + 48 frames: too few to pay.
    assert "policy.targets" not in printed
    # 60 × 8 × 2 ÷ 288
    longer = stamo("recipe", "check", path, "--set", "train.steps=60").stdout
    assert "the tokenizer's states of 288 frames are computed 3.3 times each; `stamo encode` does it once" in longer
    cached = ("--set", "train.steps=60", "--set", "policy.targets=cached")
    refused = stamo("recipe", "check", path, *cached, check=False)
    assert refused.returncode == 2
    said = " ".join(refused.stderr.split())
    assert "policy.targets: cached, but there are no states of all shards in " in said
    assert f"run `stamo encode {path} {' '.join(cached)}`, or set policy.targets: online" in said
    assert "3.3 times" not in said  # no advice to cache what is cached
    # Differences of pixels are not among the states: what the check of the recipe refuses is not advised.
    pixels = ("--set", "policy.diffusion.pseudo=pixels")
    assert "policy.targets" not in stamo("recipe", "check", path, "--set", "train.steps=60", *pixels).stdout
