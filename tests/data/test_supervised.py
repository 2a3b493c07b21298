"""How many samples have an action loss and how many a world loss, and that a policy never trains on nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from made import write_source
from typer.testing import CliRunner

from stamo_dist.cli.app import app
from stamo_dist.data.advice import advice
from stamo_dist.data.instructions import episode_tables
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.supervised import Supervision
from stamo_dist.errors import RecipeError
from stamo_dist.recipe.schema import Recipe

LENGTHS = (7, 12, 5, 9)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("supervised")
    write_source(root / "arm", lengths=LENGTHS, cameras=("front", "wrist"))
    write_source(root / "video", lengths=(3, 8), actions=0)
    return root


def policy(root: Path, horizon: int = 6, world: bool = True, **arm: object) -> Recipe:
    """`arm` weighs 3 and `video` 1, in a run of 100 batches of 8."""
    return Recipe.model_validate({
        "name": "p", "stage": "policy", "run_dir": str(root / "run"),
        "data": {
            "image_size": 32, "horizon": horizon,
            "sources": {"arm": {"path": str(root / "arm"), "weight": 3, "instruction": "push", **arm},
                        "video": {"path": str(root / "video"), "actions": False, "instruction": "look"}},
        },
        "policy": {"vision": "stamo", "tokenizer": "t", "world": {"target": "state"} if world else None},
        "train": {"steps": 100, "global_batch": 8},
    })  # fmt: skip


def supervision(recipe: Recipe) -> Supervision:
    mixture = Mixture(recipe.data, seed=0, global_batch=recipe.train.global_batch)
    return Supervision(recipe, episode_tables(mixture))


def test_shares_of_known_episodes(shards: Path) -> None:
    """A chunk of 6 begins at 2 + 7 + 0 + 4 of 33 frames; the frame 6 ahead is there at 1 + 6 + 0 + 3 of them."""
    found = supervision(policy(shards))
    arm, video = found.sources
    assert (arm.samples, arm.action, arm.world) == (66, 26, 20)  # two cameras
    assert (video.samples, video.action, video.world) == (11, 0, 2)
    assert found.share("action") == pytest.approx(0.75 * 26 / 66)
    assert found.share("world") == pytest.approx(0.75 * 20 / 66 + 0.25 * 2 / 11)
    assert found.lines == [
        "action loss: 29.5% of the samples (arm 39.4%, video 0.0%)",
        "world loss: 27.3% of the samples (arm 30.3%, video 18.2%)",
        "no actions from: video (actions: false)",
    ]
    assert not found.problems
    assert advice(policy(shards))[:3] == found.lines

    half = supervision(policy(shards, labelled=0.5, cameras=["front"])).sources[0]  # every second episode: 12 and 9
    assert (half.samples, half.action, half.world) == (33, 7 + 4, 10)
    alone = supervision(policy(shards, world=False))
    assert alone.world is None
    assert len(alone.lines) == 2


def test_the_loader_masks_the_samples_that_are_counted(shards: Path) -> None:
    from stamo_dist.data.loader import Cursor, build_loader

    recipe = policy(shards)
    mixture = Mixture(recipe.data, seed=0, global_batch=8)
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=0)
    acting, ahead = {}, {}
    for _, batch in zip(range(60), loader, strict=False):
        assert batch.mask is not None
        assert batch.ahead is not None
        acting |= dict(zip(batch.sample.tolist(), batch.mask.all(1).tolist(), strict=True))
        ahead |= dict(zip(batch.sample.tolist(), (batch.ahead == 6).tolist(), strict=True))
    loader.close()
    assert len(acting) == mixture.num_samples
    arm, video = supervision(recipe).sources
    assert (sum(acting.values()), sum(ahead.values())) == (arm.action, arm.world + video.world)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"horizon": 13},
            ["no sample has an action loss: data.horizon: 13 actions, but the longest episode of arm whose actions are "
             "read has 12 frames; set data.horizon: 12 or less",
             "no sample has a world loss: ", "set data.horizon: 11 or less"],
        ),
        ({"horizon": 12}, ["no sample has a world loss: arm is to predict 12 frames ahead, its longest episode has"]),
        (
            {"labelled": 0.2},
            ["data.sources.arm.labelled: 0.2 of 4 episodes is not one; set 0.25 or more"],
        ),
        ({"horizon": 10, "labelled": 0.25}, ["the longest episode of arm whose actions are read has 9 frames"]),
        ({"weight": {0: 0, 1000: 1}}, ["data.sources.arm.weight: the run reads nothing of it; raise it"]),
    ],
)  # fmt: skip
def test_nothing_to_learn_is_refused(shards: Path, settings: dict[str, object], parts: list[str]) -> None:
    recipe = policy(shards, **settings)
    with pytest.raises(RecipeError) as refused:
        advice(recipe)
    assert all(any(part in line for line in refused.value.problems) for part in parts), refused.value.problems
    assert len(refused.value.problems) == (2 if settings == {"horizon": 13} else 1)
    assert supervision(recipe).problems == refused.value.problems


def test_the_least_that_is_advised_is_enough(shards: Path) -> None:
    assert supervision(policy(shards, labelled=0.25)).sources[0].action == 2 * 4  # of the last episode, by two cameras
    one = supervision(policy(shards, horizon=12, world=False, cameras=["front"]))
    assert (one.sources[0].action, one.problems) == (1, [])
    assert np.isclose(one.share("action"), 0.75 / 33)


def test_sources_that_are_not_there_have_no_say(shards: Path, tmp_path: Path) -> None:
    lines = advice(policy(shards, horizon=13, path=str(tmp_path / "later")))
    assert not any("loss" in line for line in lines)
    assert lines[0] == "no actions from: video (actions: false)"


def test_sources_without_actions_are_named_and_all_of_them_are_refused(shards: Path, tmp_path: Path) -> None:
    recipe = policy(shards)
    recipe.data.sources["video"] = recipe.data.sources["video"].model_copy(update={"actions": True})
    assert advice(recipe)[2] == "no actions from: video (its shards have none)"
    refused = (
        "data.sources: no sample has an action loss: none of them has actions; a policy needs those of one at least"
    )
    nothing = policy(shards, path=str(shutil.copytree(shards / "video", tmp_path / "film")))
    with pytest.raises(RecipeError) as caught:
        advice(nothing)
    assert caught.value.problems == [refused]
    full = tmp_path / "p.json"  # YAML, too
    full.write_text(nothing.model_dump_json(exclude_defaults=True))
    said = CliRunner().invoke(app, ["mix", str(full), "--out", str(tmp_path / "p.png")])
    assert "no actions from: arm (its shards have none), video (actions: false)" in said.output
    assert isinstance(said.exception, RecipeError)
    assert said.exception.problems == [refused]


def test_all_sources_with_actions_are_no_news(shards: Path) -> None:
    recipe = policy(shards)
    del recipe.data.sources["video"]
    assert not any("no actions" in line for line in advice(recipe))
