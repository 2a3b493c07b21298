"""Pipelines: what a stage reads is made by one that it waits for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import typer

from stamo_dist.cli.app import app
from stamo_dist.errors import RecipeError
from stamo_dist.launch.pipeline import check_needs, load_pipeline
from stamo_dist.launch.recipe_checks import look
from stamo_dist.recipe.load import load, load_draft

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


def test_the_scales_are_a_chain(monkeypatch):
    """Each run begins with the one before, has a folder of its own, and fewer steps than its recipe from scratch."""
    monkeypatch.chdir(ROOT)
    _, works = load_pipeline(ROOT / "recipes/pipelines/scales.yaml", [], typer.main.get_command(app))
    assert len({work.run_dir for work in works}) == len(works) == 4
    for before, work in pairwise(works):
        assert work.loaded is not None
        initial = work.loaded.recipe.init_from
        assert initial is not None
        assert Path(initial.path).absolute() == before.run_dir
        assert work.loaded.recipe.train.steps < load(work.stage.train or "").recipe.train.steps


def test_a_stage_must_wait_for_the_run_it_begins_with(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes/pipelines/scales.yaml").read_text()
    (tmp_path / "p.yaml").write_text(text.replace("set: {name: scales_sim_droid,", "after: []\n    set: {name: b,"))
    with pytest.raises(RecipeError) as caught:
        load_pipeline(tmp_path / "p.yaml", [], typer.main.get_command(app))
    assert "sim_droid reads what sim makes" in caught.value.problems[0]


def test_a_missing_parent_is_said_before_a_job_is_queued(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def said(path: str) -> list[str]:
        looked = look(load_draft("recipes/tokenizer_demo.yaml", [f"init_from={path}", f"run_dir={tmp_path}/run"]))
        return [problem for problem in looked.problems if "init_from" in problem]

    missing = f"{tmp_path}/no_such_run"
    assert f"init_from.path: there is no folder {missing}" in said(missing)[0]
    assert (
        "init_from.path: s3://lab/run: copy it here first (stamo sync s3://lab/run FOLDER)" in said("s3://lab/run")[0]
    )
    assert said(str(tmp_path)) == said("lab/model") == []
    (tmp_path / "run/checkpoints/step_00000001").mkdir(parents=True)
    assert said(missing) == []
