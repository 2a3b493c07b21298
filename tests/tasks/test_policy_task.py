"""What a policy makes of a batch, what it refuses, and what it leaves for use."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_policy import TEXTS, write_policy_recipe

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.data.loader import Batch, Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.shards import OpenShards
from stamo_dist.errors import DataError, RecipeError
from stamo_dist.models.openvla.actions import ActionTokenizer, ValueRange
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks import build_task, check_task
from stamo_dist.tasks.noise import Noise
from stamo_dist.tasks.policy_batch import Prompts, Ranges


def mixed(recipe: Recipe) -> Mixture:
    return Mixture(recipe.data, seed=0, global_batch=8)


def first_batch(mixture: Mixture) -> Batch:
    with closing(build_loader(mixture, rank=0, world_size=1, cursor=Cursor())) as loader:
        return next(iter(loader))


@pytest.mark.parametrize("blanks", [False, True])
def test_text_and_actions_are_those_of_the_official_order(blanks: bool) -> None:
    """Row by row as the text tokenizer, the action tokenizer and the ranges make them, bin edges included."""
    rng = np.random.default_rng(0)
    text, coder = TextTokenizer.from_instructions(TEXTS, size=384), ActionTokenizer(384)
    low, high = np.array([-1.0, 0.0, 2.0]), np.array([1.0, 4.0, 2.0])
    ranges = [None, ValueRange(low, high, np.array([True, False, True]), low == high)]
    values = rng.uniform(-2, 5, (6, 2, 3)).astype(np.float32)
    values[1, 0], values[2, 1] = [1.0, 1.0, 7.0], [-1.0, -1.0, 2.0]
    source, has = torch.tensor([1, 1, 1, 0, 1, 0]), torch.tensor([1, 1, 1, 0, 1, 0]).bool()

    table = Ranges(ranges, 3, constant_is_zero=True)
    assert torch.equal(table.have(source), has)
    normal = table.normalise(torch.from_numpy(values), source).numpy()
    wanted = [ranges[1].normalise(v.astype(np.float64)) if h else 0 * v for v, h in zip(values, has, strict=True)]
    assert np.array_equal(normal, np.stack(wanted))
    normal[4, 0] = coder.edges[[0, 100, 255]]

    numbers = torch.tensor([0, 1, 1, 0, 0, 1])
    found = Prompts(text, TEXTS, coder, 6, blanks).rows(numbers, torch.from_numpy(normal), has)
    ids = [coder.encode(n) if h else None for n, h in zip(normal, has, strict=True)]
    expected = text.encode([TEXTS[n] for n in numbers], ids, blanks=6 if blanks else 0)
    width = expected.input_ids.shape[1]
    assert torch.equal(found.prompts, expected.prompts)
    assert torch.equal(found.labels[:, :width], expected.labels)
    assert torch.equal(found.attention_mask[:, :width], expected.attention_mask)
    assert torch.equal(found.input_ids[:, :width], expected.input_ids)
    assert (found.input_ids[:, width:] == text.pad).all()
    assert not found.attention_mask[:, width:].any()


def test_each_sample_gets_the_instruction_of_its_episode(toy_policy: Path, tmp_path: Path) -> None:
    recipe = load(write_policy_recipe(tmp_path / "toy.yaml", toy_policy)).recipe
    mixture = mixed(recipe)
    task = build_task(recipe, mixture)
    instructions, shards = task._data.instructions, OpenShards(mixture.shards)  # type: ignore[attr-defined]
    samples = np.arange(mixture.num_samples)
    seen = set()
    for sample, number in zip(samples, instructions.of(torch.from_numpy(samples)).tolist(), strict=True):
        shard = int(mixture.shard_of(sample))
        episode = shards[shard].sample(int(sample - mixture.first[shard]), ["episode"])["episode"]
        source, _, e = episode.split("-")
        text = TEXTS[int(e) % 2] if source == "a" else "watch the square"
        assert instructions.texts[number] == text, episode
        seen.add(text)
    assert len(seen) == 3


@pytest.mark.parametrize("actions", ["tokens", "parallel_tokens", "regression"])
def test_a_source_without_actions_never_touches_the_action_loss(toy_policy: Path, tmp_path: Path, actions: str) -> None:
    recipe = load(write_policy_recipe(tmp_path / "toy.yaml", toy_policy, actions=actions)).recipe
    mixture = mixed(recipe)
    torch.manual_seed(0)
    task = build_task(recipe, mixture)
    batch = first_batch(mixture)
    video = batch.source == 1
    assert video.any()
    assert not video.all()
    assert batch.actions is not None
    assert batch.mask is not None
    assert not batch.mask[video].any()

    out = task.loss(task.trained, batch, Noise(0).at(1))
    assert torch.equal(out.present["action"], ~video & batch.mask.all(1))
    assert not out.per_sample["action"][~out.present["action"]].any()
    garbage = torch.where(out.present["action"][:, None, None], batch.actions, torch.nan)
    other = task.loss(task.trained, replace(batch, actions=garbage), Noise(0).at(1))
    assert torch.equal(other.per_sample["loss"], out.per_sample["loss"])
    broken = task.loss(task.trained, replace(batch, actions=batch.actions * torch.nan), Noise(0).at(1))
    assert not broken.loss.isfinite(), "an action that is not finite must be noticed"

    # What stands in for an unreadable frame may be of another episode: it teaches nothing.
    every = task.loss(task.trained, replace(batch, replaced=torch.ones(8, dtype=torch.bool)), Noise(0).at(1))
    assert not every.per_sample["loss"].any()

    # A sample counts by itself: the batch's loss is the mean of its halves'.
    halves = [task.loss(task.trained, half, Noise(0).at(1)).loss for half in batch.split(4)]
    torch.testing.assert_close(sum(halves) / 2, out.loss)


def test_everything_that_is_wrong_is_refused_at_once(toy_policy: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(toy_policy / "shards", shards)
    manifest = json.loads((shards / "a" / "manifest.json").read_text())
    (shards / "a" / "manifest.json").write_text(json.dumps({**manifest, "stats": {}}))
    settings = [
        f"data.sources.a.path={shards}/a",
        "data.sources.b.instruction=null",
        "policy.vision=fused",
        "policy.proprio=true",
    ]
    recipe = load(write_policy_recipe(tmp_path / "toy.yaml", toy_policy), settings).recipe
    with pytest.raises(DataError) as caught:
        check_task(recipe, mixed(recipe))
    said = str(caught.value)
    for part in (
        "data.image_size: frames of 32 px, but policy.vision: fused reads 224 px",
        "data.sources.b: 4 of 4 episodes of",
        "set data.sources.b.instruction",
        "data.sources.a: ",
        "has no statistics of its action; run `stamo data stats",
        "has no statistics of its proprio",
    ):
        assert part in said, said

    with pytest.raises(RecipeError) as refused:
        load(
            tmp_path / "toy.yaml",
            ["data.horizon=0", "data.sources.a.actions=false", "policy.tokenizer=null", "policy.views=2"],
        )
    assert len(refused.value.problems) == 4
    recipe = load(tmp_path / "toy.yaml", ["policy.config.text_config.hiden_size=3"]).recipe
    with pytest.raises(RecipeError, match=r"text_config.hiden_size: unknown field; did you mean hidden_size"):
        check_task(recipe, mixed(recipe))


def test_what_is_trained_can_be_used(toy_policy: Path, tmp_path: Path, ranks) -> None:
    """With adapters: they are in the exported weights, and the statistics and the text tokenizer beside them."""
    recipe = write_policy_recipe(tmp_path / "toy.yaml", toy_policy, actions="regression")
    ranks(1, "train", recipe, "--set", "train.steps=1")
    start = (tmp_path / "run").rename(tmp_path / "start") / "model"
    recipe.write_text(re.sub(r"  config:\n(    .*\n)+", f"  weights: {start}\n", recipe.read_text()))
    ranks(1, "train", recipe, "--set", "policy.lora.rank=4", "--set", "policy.freeze.projector=true")
    folder = tmp_path / "run/model"
    statistics = json.loads((folder / "dataset_statistics.json").read_text())
    assert list(statistics) == ["a"]
    assert statistics["a"]["action"]["q99"] == [10.0] * 3
    marker = json.loads((tmp_path / "run/checkpoints/step_00000012/checkpoint.json").read_text())
    assert marker["recipe"]["model.statistics.a"][0]["action"]["q99"] == [10.0] * 3
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["share/action/b"] == 0  # a video
        acting = line["share/action/a"] * line["samples/a"]
        assert line["share/action"] == pytest.approx(acting / (line["samples/a"] + line["samples/b"]))
    # One pass over all. Of an episode's 12 frames the last has no second action, the last two no frame to predict.
    shares = {term: np.mean([line[f"share/{term}"] for line in lines]) for term in ("action", "world_mse", "world_l1")}
    assert shares["action"] == pytest.approx(11 / 24)
    assert shares["world_mse"] == shares["world_l1"] == pytest.approx(10 / 12)

    policy = Policy.from_pretrained(folder)
    mixture = mixed(load(recipe).recipe)
    batch = first_batch(mixture)
    frame = batch.images[0].numpy()
    actions = policy.act(frame, TEXTS[0])
    assert actions.shape == (2, 3)
    assert np.isfinite(actions).all()
    assert not any("lora" in name for name, _ in policy.network.named_parameters())
