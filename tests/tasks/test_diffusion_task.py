"""The diffusion policy on the shared loop: what a video may touch, how it is spread and resumed, and that it acts."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_policy import TEXTS, write_diffusion_recipe

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.data.frame_cache import write_cache
from stamo_dist.data.loader import Batch, CachedStates, CacheKeys, Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import RecipeError
from stamo_dist.models.policies import load_policy
from stamo_dist.models.rdt_policy import RDTPolicy
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe.load import load
from stamo_dist.tasks import build_task
from stamo_dist.tasks.diffusion import DiffusionTask
from stamo_dist.tasks.noise import Noise


def first_batch(mixture: Mixture, states: CachedStates | None = None, workers: int = 0) -> Batch:
    caches = CacheKeys(states=states)
    with closing(
        build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), caches=caches, workers=workers)
    ) as loader:
        return next(iter(loader))


STEP = ["policy.targets=cached", "policy.diffusion.pseudo_per=step", "data.horizon=4"]


@pytest.mark.parametrize("pseudo", ["none", "motion", "pixels"])
def test_what_a_sample_lacks_teaches_nothing(toy_policy: Path, tmp_path: Path, pseudo: str) -> None:
    settings = ["data.sources.a.labelled=0.5"]
    recipe = load(write_diffusion_recipe(tmp_path / "toy.yaml", toy_policy, pseudo=pseudo), settings).recipe
    mixture = Mixture(recipe.data, seed=0, global_batch=16)
    torch.manual_seed(0)
    task = build_task(recipe, mixture)
    batch = first_batch(mixture)
    assert batch.mask is not None
    assert batch.actions is not None
    episode = batch.sample // 12  # of source a: every second of its four is labelled
    labelled = (batch.source == 0) & (episode % 2 == 1) & batch.mask.all(1)
    assert 0 < labelled.sum() < (batch.source == 0).sum()

    out = task.loss(task.trained, batch, Noise(0).at(1))
    assert torch.equal(out.present["action"], labelled)
    assert not out.per_sample["action"][~labelled].any()
    garbage = torch.where(labelled[:, None, None], batch.actions, torch.nan)
    other = task.loss(task.trained, replace(batch, actions=garbage), Noise(0).at(1))
    assert torch.equal(other.per_sample["loss"], out.per_sample["loss"])
    broken = task.loss(task.trained, replace(batch, actions=batch.actions * torch.nan), Noise(0).at(1))
    assert not broken.loss.isfinite(), "an action that is not finite must be noticed"
    halves = [task.loss(task.trained, half, Noise(0).at(1)).loss for half in batch.split(8)]
    torch.testing.assert_close(sum(halves) / 2, out.loss)
    assert ("pseudo" in out.per_sample) == (pseudo != "none")
    if pseudo != "none":
        assert (out.per_sample["pseudo"] > 0).sum() > labelled.sum(), "videos have pseudo-actions"


def curve(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "action", "pseudo", "grad_norm", "samples")
    return [{k: v for k, v in line.items() if k.partition("/")[0] in kept} for line in lines]


def test_it_trains_alike_resumes_exactly_and_acts(toy_policy: Path, ranks, tmp_path: Path) -> None:
    one, two = (
        write_diffusion_recipe(tmp_path / name / "toy.yaml", toy_policy, strategy=strategy)
        for name, strategy in (("one", "ddp"), ("two", "fsdp"))
    )
    ranks(1, "train", one)
    ranks(2, "train", two)
    expected, found = curve(one.parent / "run"), curve(two.parent / "run")
    assert len(expected) == 12
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-4)

    run = two.parent / "run"
    exported = (run / "model/model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints/step_00000012")
    assert "after step 6" in ranks(2, "train", two)[1]
    assert curve(run) == found
    assert (run / "model/model.safetensors").read_bytes() == exported

    policy = load_policy(run)
    assert isinstance(policy, RDTPolicy)
    recipe = load(two).recipe
    frames = first_batch(Mixture(recipe.data, seed=0, global_batch=2)).images.numpy()
    felt = np.zeros((2, 2))
    actions = policy.act_batch([[f] for f in frames], list(TEXTS), proprio=felt)
    assert actions.shape == (2, 2, 3)
    assert ((actions >= -1e-6) & (actions <= 10 + 1e-6)).all(), "inside the statistics"
    assert np.allclose(policy.act(frames[1], TEXTS[1], proprio=felt[1]), actions[1], atol=1e-4)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_step_has_its_motion_up_to_the_episodes_end(toy_policy: Path, tmp_path: Path, workers: int) -> None:
    root = shutil.copytree(toy_policy, tmp_path / "data")
    settings = ["data.sources.a.labelled=0.5", *STEP]
    recipe = load(write_diffusion_recipe(tmp_path / "toy.yaml", root), settings).recipe
    mixture = Mixture(recipe.data, seed=0, global_batch=32)
    fingerprint = Tokenizer.from_pretrained(root / "tokenizer").fingerprint()
    rows = np.random.default_rng(0).normal(size=(mixture.num_samples, 2, 32)).astype(np.float32)
    for shard, first in zip(mixture.shards, mixture.first, strict=True):
        write_cache(shard, "states", fingerprint, rows[first : first + shard.samples], "float32")
    torch.manual_seed(0)
    task = build_task(recipe, mixture)
    assert isinstance(task, DiffusionTask)
    assert task.states == CachedStates(fingerprint, each=True)
    assert task.sizes.motion == (4, 64), "one token a step"
    assert abs(task.scale - 2**0.5) < 0.15, "differences of independent normal numbers"
    batch = first_batch(mixture, task.states, workers)
    assert batch.ahead is not None
    assert batch.target_state is None
    t = batch.sample % 12  # of 12 frames an episode
    left = (11 - t).clamp_max(4)
    assert torch.equal(batch.ahead, left)
    assert {0, 1, 4} <= set(left.tolist()), "episode ends were met"

    _, clean, _, has_motion = task._timestep(batch)
    assert has_motion.tolist() == [[k < n for k in range(4)] for n in left]
    assert clean.motion is not None
    for sample, found, n in zip(batch.sample.tolist(), clean.motion, left.tolist(), strict=True):
        steps = np.diff(rows[sample : sample + n + 1], axis=0).reshape(n, 64)
        np.testing.assert_allclose(found[:n] * task.scale, steps, atol=1e-5)
        assert not found[n:].any()

    out = task.loss(task.trained, batch, Noise(0).at(1))
    assert torch.equal(out.present["pseudo"], left > 0)
    assert torch.equal(out.per_sample["pseudo"] > 0, left > 0)
    # What lies behind an episode's end is neither seen nor learnt from, whatever the memory holds there.
    assert batch.next_states is not None
    behind = ~has_motion[..., None, None]
    dirty = replace(batch, next_states=torch.where(behind, torch.nan, batch.next_states))
    assert torch.equal(task.loss(task.trained, dirty, Noise(0).at(1)).per_sample["loss"], out.per_sample["loss"])
    halves = [task.loss(task.trained, half, Noise(0).at(1)).loss for half in batch.split(16)]
    torch.testing.assert_close(sum(halves) / 2, out.loss)

    task.export(tmp_path / "model", task.network.state_dict(), [])
    policy = RDTPolicy.from_pretrained(tmp_path / "model", tokenizer=root / "tokenizer")
    assert policy.network.sizes == task.sizes
    frame, felt = batch.images[0].numpy(), np.zeros(2)
    assert policy.act(frame, TEXTS[0], proprio=felt).shape == (4, 3)
    # A folder from before the field opens as one motion a chunk.
    about = json.loads((tmp_path / "model/policy.json").read_text())
    assert about["policy"]["diffusion"].pop("pseudo_per") == "step"
    (tmp_path / "model/policy.json").write_text(json.dumps(about))
    again = RDTPolicy.from_pretrained(tmp_path / "model", tokenizer=root / "tokenizer")
    assert again.cfg.diffusion is not None
    assert again.cfg.diffusion.pseudo_per == "chunk"


def test_a_motion_of_each_step_needs_the_cache(toy_policy: Path, tmp_path: Path) -> None:
    recipe = write_diffusion_recipe(tmp_path / "toy.yaml", toy_policy)
    for settings, part in (
        (["policy.diffusion.pseudo_per=step"], "run `stamo encode` and set policy.targets: cached"),
        (["policy.diffusion.pseudo_per=step", "policy.diffusion.pseudo=pixels"], "step has motions only"),
        ([*STEP, "data.sources.b.horizon=2"], "data.sources.b.horizon: 2, but with pseudo_per: step"),
    ):
        with pytest.raises(RecipeError) as refused:
            load(recipe, settings)
        assert part in "\n".join(refused.value.problems), part
    assert load(recipe, ["policy.diffusion.pseudo_per=step", "policy.diffusion.pseudo=none"])


def test_fields_of_the_other_policy_are_refused(toy_policy: Path, tmp_path: Path) -> None:
    recipe = write_diffusion_recipe(tmp_path / "toy.yaml", toy_policy, pseudo="pixels")
    wrong = ["policy.weights=x", "policy.stamo=both", "policy.vision=fused", "policy.targets=cached"]
    with pytest.raises(RecipeError) as refused:
        load(recipe, wrong)
    said = "\n".join(refused.value.problems)
    for part in (
        "policy.weights: is of OpenVLA",
        "policy.stamo: ",
        "policy.vision: ",
        "policy.targets: pseudo: pixels",
    ):
        assert part in said, said
