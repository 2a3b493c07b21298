"""Pipelines: what a stage reads is made by one that it waits for."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from stamo_dist.cli.app import app
from stamo_dist.errors import RecipeError
from stamo_dist.launch.pipeline import check_needs, load_pipeline

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


WRONG = """\
stages:
  raw:
    run: data simulate metaworld raw/made --tasks reach-v3
  made:
    run: data convert metaworld raw/made shards/made --size 64
  lost:
    run: data convert libero raw/lost shards/lost --size 64
    aftr: []
  vae:
    train: recipes/no_such.yaml
    after: [lost, madee]
  measure:
    run: eval reconstruct demo/runs/no_such --framez 3
"""


def test_all_that_is_wrong_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(WRONG)
    with pytest.raises(RecipeError) as caught:
        load_pipeline(tmp_path / "p.yaml", [], typer.main.get_command(app))
    said = "\n".join(caught.value.problems)
    for part in (
        "p.yaml:8: stages.lost.aftr: no such field; did you mean after?",
        "p.yaml:11: stages.vae.after: madee is no stage above vae; did you mean made?",
        "p.yaml:10: stages.vae.train: recipes/no_such.yaml",
        "p.yaml:13: stages.measure.run:",
    ):
        assert part in said, said


def test_what_a_stage_reads_is_there_or_made_by_one_above(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = WRONG.replace("    aftr: []\n", "").partition("  vae:")[0]
    (tmp_path / "p.yaml").write_text(text + "  measure:\n    run: eval reconstruct runs/no_such\n")
    _, works = load_pipeline(tmp_path / "p.yaml", [], typer.main.get_command(app))
    with pytest.raises(RecipeError) as caught:
        check_needs(works)
    lost, measure = caught.value.problems
    assert f"p.yaml:6: stages.lost: lost reads {tmp_path}/raw/lost, which is not there" in lost
    assert "measure reads" in measure
    (tmp_path / "shards" / "lost").mkdir(parents=True)  # converted before: its raw data may be gone
    (tmp_path / "runs" / "no_such").mkdir(parents=True)
    check_needs(works)


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
