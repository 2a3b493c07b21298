"""Pipelines: what a stage reads is made by one that it waits for."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from stamo_dist.cli.app import app
from stamo_dist.errors import RecipeError
from stamo_dist.launch.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]
STAGES = """\
stages:
  tokenizer:
    train: recipes/tokenizer_demo.yaml
  report:
    run: report demo/runs/tokenizer
    after: []
  policy:
    train: recipes/policy_openvla_state_demo.yaml
    after: [report]
"""


def test_a_stage_that_does_not_wait_for_what_it_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "p.yaml").write_text(STAGES)
    with pytest.raises(RecipeError) as caught:
        load_pipeline(tmp_path / "p.yaml", [], typer.main.get_command(app))
    first, second = caught.value.problems
    assert "p.yaml:6: stages.report.after: report reads what tokenizer makes; add tokenizer" in first
    assert "p.yaml:9: stages.policy.after: policy reads what tokenizer makes" in second
    (tmp_path / "p.yaml").write_text(STAGES.replace("after: []", "after: [tokenizer]"))
    load_pipeline(tmp_path / "p.yaml", [], typer.main.get_command(app))  # through report


@pytest.mark.parametrize("name", ["demo", "sim_droid"])
def test_policies_see_through_the_tokenizer_of_their_pipeline(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, works = load_pipeline(ROOT / f"recipes/pipelines/{name}.yaml", [], typer.main.get_command(app))
    stages = {work.name: work for work in works}
    policy = stages["policy"].loaded
    assert policy is not None
    assert Path(policy.recipe.policy.tokenizer or "").absolute() == stages["tokenizer"].run_dir
    counted = {
        work.words[2] for work in works if work.words[:2] == ["data", "stats"] and work.name in stages["policy"].after
    }
    assert {source.path for source in policy.recipe.data.used.values()} == counted
