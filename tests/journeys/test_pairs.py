"""Options in pairs: what a recipe accepts and refuses, and a few of the runs that `make test-matrix` makes all of."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pairs
import pytest
from forked import Ranks
from toy_policy import make_base, make_policy_data

from stamo_dist.errors import RecipeError
from stamo_dist.recipe.load import load


@pytest.fixture(scope="module")
def toys(toy: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> pairs.Toys:
    root = tmp_path_factory.mktemp("pairs")
    policy = make_policy_data(root / "policy", ("front", "wrist"))
    shards = shutil.copytree(toy.shards, root / "shards")  # caches are written beside them
    return pairs.Toys(shards, toy.vae, policy, make_base(root / "base"))


@pytest.mark.parametrize("stage", pairs.OPTIONS)
def test_what_no_run_has_is_refused_by_its_field(toys: pairs.Toys, stage: str, tmp_path: Path) -> None:
    for row, field in pairs.refused(stage):
        recipe, settings = toys.write(stage, row, tmp_path)
        with pytest.raises(RecipeError) as refused:
            load(recipe, settings[1::2])
        assert field in str(refused.value), row


@pytest.mark.parametrize("stage", ["tokenizer", "openvla"])
def test_a_run_of_many_options_ends_well(toys: pairs.Toys, ranks: Ranks, stage: str, tmp_path: Path) -> None:
    toys.encode(ranks, tmp_path / "encoded")
    rows = [row for row in pairs.rows(stage) if row["compile"] == "no" and row["processes"] == "2"]
    row = max(rows, key=lambda row: sum(value != next(iter(pairs.OPTIONS[stage][o])) for o, value in row.items()))
    problem = pairs.run(ranks, toys, stage, row, tmp_path / "run")
    assert not problem, f"{row}: {problem}"
