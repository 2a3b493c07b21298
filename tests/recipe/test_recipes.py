"""The recipes in the repository: each loads on the world sizes it is meant for, each fragment is valid as a part."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import typer

from stamo_dist.cli.app import app
from stamo_dist.errors import RecipeError
from stamo_dist.launch.pipeline import load_pipeline
from stamo_dist.recipe.batching import batching
from stamo_dist.recipe.lines import read_file
from stamo_dist.recipe.load import dump, load
from stamo_dist.recipe.unread import unread

ROOT = Path(__file__).parents[2]
RUNNABLE = sorted(ROOT.glob("recipes/*.yaml"))
PIPELINES = sorted(ROOT.glob("recipes/pipelines/*.yaml"))
FRAGMENTS = sorted({*ROOT.glob("recipes/*/*.yaml")} - {*PIPELINES})
PAPER = ("tokenizer_sim", "tokenizer_sim_droid", "tokenizer_sim_droid_oxe", "tokenizer_sim_droid_oxe_ego")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


@pytest.mark.parametrize("path", RUNNABLE, ids=name)
def test_recipe_loads_at_many_world_sizes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a recipe is read from does not matter
    demo = path.stem.endswith("_demo")
    for world_size in (1, 2, 4) if demo else (1, 2, 8, 16, 64):
        loaded = load(path, world_size=world_size)
        b = batching(loaded.recipe.train, world_size)
        assert b.micro_batch * b.accumulation * world_size == loaded.recipe.train.global_batch
        assert b.micro_batch <= loaded.recipe.train.micro_batch
    Path("resolved.yaml").write_text(dump(loaded.recipe))
    again = load("resolved.yaml")
    assert again.recipe == loaded.recipe
    assert unread(loaded) == unread(again) == []


@pytest.mark.parametrize(
    ("recipe", "override", "note"),
    [
        ("vae_demo", "model.compressor.tokens=4", "no effect in the vae stage: model.compressor.tokens (--set)"),
        ("tokenizer_demo", "policy.lora={rank: 8}", "no effect in the tokenizer stage: policy.lora.rank (--set)"),
        ("policy_openvla_motion", "flow.shift=3", "no effect in the policy stage: flow.shift (--set)"),
        ("policy_openvla_motion", "flow.shift=1.0", None),  # as it is anyway
        ("tokenizer_demo", "flow.shift=3", None),
    ],
)
def test_what_the_stage_does_not_read_is_said(recipe, override, note):
    assert unread(load(ROOT / "recipes" / f"{recipe}.yaml", [override])) == ([note] if note else [])


def test_the_paper_has_its_four_mixtures():
    sources = [set(load(ROOT / "recipes" / f"{stem}.yaml").recipe.data.sources) for stem in PAPER]
    assert all(small < large for small, large in pairwise(sources))
    assert "droid" not in sources[0]
    assert sources[1] - sources[0] == {"droid"}
    main = load(ROOT / "recipes/tokenizer_sim_droid.yaml").recipe
    assert (main.model.compressor.tokens, main.model.compressor.dim, main.model.encoder.train) == (2, 1024, False)


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_pipeline_names_recipes_and_commands_that_are_there(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, stages = load_pipeline(path, [], typer.main.get_command(app))
    assert all(work.loaded is not None for work in stages if work.trains)


@pytest.mark.parametrize("path", FRAGMENTS, ids=name)
def test_fragment_is_valid_as_a_part(path):
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert all(": missing (" in problem for problem in caught.value.problems), caught.value  # only what it leaves out


@pytest.mark.parametrize("path", [*RUNNABLE, *FRAGMENTS], ids=name)
def test_editors_find_the_schema_and_accept_the_file(path):
    jsonschema = pytest.importorskip("jsonschema", reason="needs the [dev] extra: pip install -e '.[dev]'")
    first = path.read_text().splitlines()[0]
    schema = read_file(path.parent / first.removeprefix("# yaml-language-server: $schema=")).value  # JSON is YAML
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(read_file(path).value, schema)
