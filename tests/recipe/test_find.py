"""Recipes by name: those here first, then those that come with stamo."""

from __future__ import annotations

from pathlib import Path

import pytest

from stamo_dist import shipped
from stamo_dist.errors import RecipeError
from stamo_dist.launch.pipeline import is_pipeline
from stamo_dist.recipe.find import find_recipe, names
from stamo_dist.recipe.load import load
from stamo_dist.run.recipe_history import resolved_at

OWN = "extends: tokenizer_sim.yaml\nrun_dir: here\n"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_demo", "tokenizer_demo.yaml", "recipes/tokenizer_demo.yaml"])
def test_a_name_is_of_a_recipe_here_or_else_of_one_that_comes_with_stamo(name: str) -> None:
    loaded = load(name)
    assert loaded.path == shipped.RECIPES / "tokenizer_demo.yaml"
    assert resolved_at(name) == loaded.resolved
    Path("recipes").mkdir()
    Path("recipes/tokenizer_demo.yaml").write_text(OWN)
    own = load(name)
    assert own.recipe.run_dir == "here"
    assert own.provenance["run_dir"] == "recipes/tokenizer_demo.yaml:2"
    assert own.recipe.model == load("tokenizer_sim").recipe.model


def test_ones_own_are_listed_first() -> None:
    Path("recipes").mkdir()
    Path("recipes/zebra.yaml").write_text(OWN)
    Path("recipes/tokenizer_demo.yaml").write_text(OWN)
    assert list(names())[:2] == ["tokenizer_demo", "zebra"]
    assert names()["tokenizer_demo"] == Path("recipes/tokenizer_demo.yaml")
    assert len(names()) == len([*shipped.RECIPES.rglob("*.yaml")]) + 1


def test_a_file_comes_first_and_a_folder_of_the_name_hides_nothing() -> None:
    Path("vae_demo").mkdir()
    assert load("vae_demo").recipe.stage == "vae"
    Path("tokenizer_demo").write_text(OWN)
    assert load("tokenizer_demo").recipe.run_dir == "here"


def test_pipelines_are_found_and_their_recipes_too() -> None:
    assert is_pipeline(Path("pipelines/scales"))
    assert not is_pipeline(Path("tokenizer_demo"))
    assert {"pipelines/scales", "mixtures/sim", "tokenizer_sim"} <= set(names())


def test_nothing_is_found_outside() -> None:
    outside = Path("../setup")
    assert find_recipe(outside) == outside


def test_an_unknown_name_says_the_closest_or_where_the_names_are() -> None:
    with pytest.raises(RecipeError, match=r"tokenizer_dem: no such file; did you mean tokenizer_demo\?"):
        load("tokenizer_dem")
    with pytest.raises(RecipeError, match="xyz: no such file; `stamo recipe list` shows what can be given by name"):
        load("xyz")
