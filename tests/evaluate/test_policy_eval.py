"""What is measured of a trained policy: its chunks against held-out actions, and how fast it acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from point_world import PointBenchmarks
from toy_policy import write_diffusion_recipe, write_policy_recipe

from stamo_dist.errors import RunError
from stamo_dist.evaluate.actions import ActionErrors
from stamo_dist.evaluate.rollout import PolicyRollout
from stamo_dist.evaluate.speed import PARTS, PolicySpeed
from stamo_dist.models.rdt_policy import RDTPolicy


@pytest.fixture(scope="module")
def runs(toy_policy: Path, ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind."""
    root = tmp_path_factory.mktemp("policies")
    found = {}
    for name, write in (("openvla", write_policy_recipe), ("diffusion", write_diffusion_recipe)):
        recipe = write(root / name / "toy.yaml", toy_policy)
        ranks(1, "train", recipe, "--set", "train.steps=3")
        found[name] = recipe.parent / "run"
    return found


def test_the_error_is_that_of_the_chunks(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    result = ActionErrors(str(runs["openvla"]), frames=10).evaluate()
    (row,) = result.rows
    assert (row["source"], row["frames"]) == ("a", 10), "the video has no actions"
    assert 0 < row["mae"] <= row["rmse"] <= 2
    assert (runs["openvla"] / "eval/actions/actions.json").is_file()

    # The toy's action at frame t is t in every dimension, and its statistics make 0 … 10 into −1 … 1: a policy that
    # always answers 5 is wrong by |t − 5| / 5, at most 1.
    def five(self, images, instructions, **_):
        return np.full((len(images), 2, 3), 5.0)

    monkeypatch.setattr(RDTPolicy, "act_batch", five)
    (row,) = ActionErrors(str(runs["diffusion"]), frames=48).evaluate().rows
    error = [[min(abs(t + k - 5) / 5, 1) for k in range(2) if t + k < 12] for t in range(12)]
    assert row["mae"] == pytest.approx(np.mean([number for e in error for number in e]), rel=1e-6)
    assert row["first"] == pytest.approx(np.mean([e[0] for e in error]), rel=1e-6)
    assert row["last"] == pytest.approx(np.mean([e[1] for e in error if len(e) == 2]), rel=1e-6)


def test_the_diffusion_policy_is_rolled_out_and_a_tokenizer_is_not(
    runs: dict[str, Path], run: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tasks": ("suite/one",), "benchmark": "toy", "size": 32, "max_steps": 2, "trials": 2}
    result = PolicyRollout(
        str(runs["diffusion"]), benchmarks=PointBenchmarks(), processes=1, out=tmp_path / "out", **options
    ).evaluate()
    assert result is not None
    assert (result.rows[0]["trials"], result.provenance.step) == (2, 3)
    with pytest.raises(RunError, match="its recipe trains the tokenizer stage; give the run folder of a policy"):
        PolicyRollout(str(run), benchmarks=PointBenchmarks(), **{**options, "benchmark": None}).evaluate()


def test_speed_with_each_head(runs: dict[str, Path], tmp_path: Path) -> None:
    result = PolicySpeed(runs["openvla"], batch=(1, 2), calls=3, device=["cpu"]).evaluate()
    assert [(row["part"], row["batch"]) for row in result.rows] == [(p, b) for b in (1, 2) for p in PARTS]
    assert [row["ratio"] for row in result.rows if row["part"] == PARTS[0]] == [1, 1]
    assert all(row["ratio"] > 0 and row["low"] <= row["hz"] <= row["high"] for row in result.rows)
    (row,) = PolicySpeed(runs["diffusion"], calls=3, device=["cpu"]).evaluate().rows
    assert (row["part"], row["ratio"]) == ("diffusion, 5 steps", None)
    recipe = runs["openvla"].parent / "toy.yaml"
    result = PolicySpeed(recipe, set_=["policy.actions=regression"], calls=3, device=["cpu"], out=tmp_path).evaluate()
    assert (len(result.rows), result.provenance.checkpoint) == (3, "random weights")
    with pytest.raises(RunError, match="--device tpu: this machine has cpu"):
        PolicySpeed(recipe, device=["tpu"]).evaluate()
