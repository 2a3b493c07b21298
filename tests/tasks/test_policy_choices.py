"""Choices that are fields: several cameras, and the ablations of the world head. Each trains a step."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import make_source
from toy_policy import TEXTS, set_statistics, write_policy_recipe

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.data.loader import Batch, Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import DataError
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.recipe.load import load
from stamo_dist.tasks import build_task
from stamo_dist.tasks.noise import Noise
from stamo_dist.tasks.policy import PolicyTask

TOWERS = [
    "policy.tokenizer=null", "policy.vision=fused", "policy.world=null", "data.image_size=28",
    "policy.config.image_sizes=[28, 28]",
    "policy.config.timm_kwargs=[{embed_dim: 16, depth: 3, num_heads: 2}, {embed_dim: 8, depth: 2, num_heads: 2}]",
]  # fmt: skip


def started(recipe_path: Path, settings: list[str]) -> tuple[PolicyTask, Batch]:
    """The task of a recipe, and the first global batch of eight."""
    recipe = load(recipe_path, settings).recipe
    mixture = Mixture(recipe.data, seed=0, global_batch=8)
    torch.manual_seed(0)
    task = build_task(recipe, mixture)
    assert isinstance(task, PolicyTask)
    with closing(build_loader(mixture, rank=0, world_size=1, cursor=Cursor())) as loader:
        return task, next(iter(loader))


@pytest.mark.parametrize("vision", ["towers", "stamo"])
def test_a_policy_sees_all_views(toy_policy: Path, tmp_path: Path, vision: str) -> None:
    size = 28 if vision == "towers" else 32
    source = make_source(
        tmp_path / "shards", "a", size=size, cameras=("front", "wrist"), splits=("train",), shard_bytes=1 << 20
    )
    set_statistics(source)
    settings = [
        f"data.sources.a.path={source}", "data.sources.b.weight=0", "data.sources.a.instruction=move the square",
        "data.views=2", "policy.views=2", *(TOWERS if vision == "towers" else []),
    ]  # fmt: skip
    path = write_policy_recipe(tmp_path / "toy.yaml", toy_policy, actions="regression", proprio=True)
    task, batch = started(path, settings)
    out = task.loss(task.trained, batch, Noise(0).at(1))
    out.loss.backward()
    assert batch.views is not None
    other = task.loss(task.trained, replace(batch, views=255 - batch.views), Noise(0).at(1))
    assert (other.per_sample["loss"] != out.per_sample["loss"])[out.present["action"]].all()

    task.export(tmp_path / "model", task.trained.state_dict(), [])
    policy = Policy.from_pretrained(tmp_path / "model")
    cameras, felt = batch.cameras().numpy(), np.zeros(2)
    if vision == "towers":
        seen = torch.stack([policy.processor(list(views)) for views in cameras])
        assert torch.equal(task._inputs(batch).images, seen), "training and inference show the network the same"
    assert policy.act(list(cameras[0]), TEXTS[0], proprio=felt).shape == (2, 3)
    with pytest.raises(DataError, match="looks at 2 views of a moment, not 1"):
        policy.act(cameras[0, 0], TEXTS[0], proprio=felt)


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        (["policy.world.l1=0"], {"world_mse"}),
        (["policy.world.mse=0"], {"world_l1"}),
        (["policy.world.target=dinov2"], {"world_mse", "world_l1"}),
        (["policy.world=null"], set()),
    ],
    ids=["MSE only", "L1 only", "raw DINOv2", "no head"],
)
def test_ablations_train_a_step(toy_policy: Path, tmp_path: Path, settings: list[str], terms: set[str]) -> None:
    """The loss is the action's and that of the switched-on terms alone, and a step on the batch lowers it."""
    task, batch = started(write_policy_recipe(tmp_path / "toy.yaml", toy_policy), settings)
    optimizer = torch.optim.AdamW(task.trained.parameters(), 1e-3)
    out = task.loss(task.trained, batch, Noise(0).at(1))
    found = out.per_sample
    assert torch.allclose(found["loss"], found["action"] + sum(found[term] for term in terms))
    assert (task.network.world_head is None) == (not terms)
    if settings == ["policy.world.target=dinov2"]:
        assert task.network.sizes.target == (16, 32), "all patches"
    out.loss.backward()
    optimizer.step()
    assert task.loss(task.trained, batch, Noise(0).at(1)).loss < out.loss
