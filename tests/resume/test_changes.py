"""A start whose recipe differs from the last says so, wherever a user may look; a decay branches off a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from toy import write_recipe


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rates(run: Path) -> dict[int, float]:
    return {line["step"]: line["lr"] for line in lines(run / "metrics.jsonl")}


@pytest.fixture(scope="module")
def changed(toy, stamo, tmp_path_factory):
    """A run of three starts, each with another recipe; and what the last two said."""
    recipe = write_recipe(tmp_path_factory.mktemp("changes") / "toy.yaml", toy.shards, toy.vae)
    said = [
        stamo("train", recipe, *(x for s in settings.split() for x in ("--set", s))).stdout
        for settings in (
            "train.steps=10",
            "train.steps=20 optimizer.clip=2.0",
            "train.steps=30 optimizer.clip=2.0 optimizer.schedule_from=here",
        )
    ]
    return recipe.parent / "run", said[1:]


def test_every_field_that_differs_is_said_once(changed):
    run, (second, third) = changed
    assert "optimizer.clip: 1.0 → 2.0" in second
    assert "train.steps: 10 → 20" in second
    rate = rates(run)
    assert f"learning rate: 0.0001 at step 10, then {rate[11]:.4g}" in second
    assert "optimizer.clip" not in third
    assert "optimizer.schedule_from: begin → here" in third
    assert rate[20] == pytest.approx(1e-4)
    assert rate[21] == pytest.approx(1e-4, rel=0.05)


def test_it_is_kept_where_users_look(changed, stamo):
    run, _ = changed
    starts = lines(run / "starts.jsonl")
    assert starts[1]["changed"] == {"optimizer.clip": ["1.0", "2.0"], "train.steps": ["10", "20"]}
    assert "changed" not in starts[0]
    assert {line["step"]: line["changed"] for line in lines(run / "metrics.jsonl") if "changed" in line}[11]
    assert "optimizer.clip: 1.0 → 2.0" in " ".join(stamo("status", run).stdout.split())
    stamo("report", run)
    page = (run / "report.html").read_text()
    assert "What changed when" in page
    assert 'class="mark"' in page


def test_changes_of_abandoned_steps(toy, ranks, stamo, tmp_path):
    """Those of a start killed before it saved are in the metrics after the next one; going back takes them along."""
    recipe, run = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "run"
    clip = ["--set", "optimizer.clip=2.0"]
    ranks(1, "train", recipe, "--set", "train.steps=10")
    ranks(1, "train", recipe, *clip, "--set", "train.steps=12")
    shutil.rmtree(run / "checkpoints/step_00000012")
    ranks(1, "train", recipe, *clip, "--set", "train.steps=12")
    expected = {"optimizer.clip": ["1.0", "2.0"], "train.steps": ["10", "12"]}
    assert [(m["step"], m["changed"]) for m in lines(run / "metrics.jsonl") if "changed" in m] == [(11, expected)]
    ranks(1, "train", recipe, "--resume", run / "checkpoints/step_00000010", "--set", "train.steps=12")
    del expected["optimizer.clip"]
    assert [(m["step"], m["changed"]) for m in lines(run / "metrics.jsonl") if "changed" in m] == [(11, expected)]
    said = " ".join(stamo("status", run).stdout.split())
    assert "changed @ 10 train.steps: 10 → 12" in said
    assert "optimizer.clip" not in said


def test_recipe_diff_of_a_checkpoint_and_its_run(changed, stamo):
    run, _ = changed
    found = stamo("recipe", "diff", run / "checkpoints/step_00000020", run, check=False)
    assert found.returncode == 1
    assert found.stdout.splitlines() == ["optimizer.schedule_from: begin → here", "train.steps: 20 → 30"]
    assert stamo("recipe", "diff", run, run / "resolved.yaml").stdout == "no difference\n"
    wrong = stamo("recipe", "diff", run, run / "model", check=False)
    assert wrong.returncode == 2
    assert "is no recipe, no run folder" in wrong.stderr
    drawn = stamo("recipe", "show", run / "resolved.yaml", "--lr", "--png", run / "lr.png").stdout
    assert "to step 30 as trained" in drawn
    assert (run / "lr.png").stat().st_size > 5000
    folder = stamo("recipe", "show", run / "resolved.yaml", "--lr", "--png", run, check=False)
    assert folder.returncode == 2
    assert f"{run}: cannot be written" in folder.stderr


def test_a_decay_branches_off(toy, stamo, tmp_path):
    """The branch has the run's batches and weights up to the step, and a rate that falls; a second start goes on."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    wsd = [x for s in ("schedule=wsd", "decay_steps=4") for x in ("--set", f"optimizer.{s}")]
    stamo("train", recipe, *wsd)
    run, child = tmp_path / "run", tmp_path / "run-10"
    said = stamo("train", recipe, *wsd, "--branch", 10).stdout
    assert "continuing" in said
    assert "train.steps: 20 → 14" in said
    assert rates(child) == {step: pytest.approx(1e-3 - 9e-4 * (step - 10) / 4) for step in (11, 12, 13, 14)}
    first = lines(run / "metrics.jsonl")[10], lines(child / "metrics.jsonl")[0]
    assert first[0]["loss"] == first[1]["loss"]
    assert json.loads((child / "parent.json").read_text())["step"] == 10
    assert "already trained to step 14" in stamo("train", recipe, *wsd, "--branch", 10).stdout
    for step, why in ((18, "checkpoints of steps 10, 20"), (20, "is stable from step 2 to 16")):
        refused = stamo("train", recipe, *wsd, "--branch", step, check=False)
        assert refused.returncode == 2
        assert why in refused.stderr
    assert not (tmp_path / "run-20").exists()


def test_a_branch_says_what_changed_since_its_step_and_begins_with_no_damaged_checkpoint(toy, stamo, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    constant = [x for s in ("schedule=constant", "decay_steps=2") for x in ("--set", f"optimizer.{s}")]
    stamo("train", recipe, *constant, "--set", "train.steps=12")
    kept, clip = ["--set", "train.checkpoint.keep=3"], ["--set", "optimizer.clip=2.0"]
    stamo("train", recipe, *constant, *kept, *clip, "--set", "train.steps=13")
    assert "optimizer.clip: 1.0 → 2.0" in stamo("train", recipe, *constant, *clip, "--branch", 10).stdout
    child, file = tmp_path / "run-12", next((tmp_path / "run/checkpoints/step_00000012/state").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused = stamo("train", recipe, *constant, *clip, "--branch", 12, check=False)
    assert refused.returncode == 2
    assert f"changed since it was written: state/{file.name}" in refused.stderr
    assert not child.exists()


def test_no_silence_where_the_last_recipe_cannot_be_read_and_no_decay_longer_than_what_is_left(toy, stamo, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    stamo("train", recipe, "--set", "train.steps=4")
    (tmp_path / "run/resolved.yaml").write_text("name: [")
    for start in ("begin", "here"):
        wsd = [f"optimizer.{s}" for s in ("schedule=wsd", "decay_steps=5", f"schedule_from={start}")]
        long = stamo("train", recipe, *(x for s in ["train.steps=6", *wsd] for x in ("--set", s)), check=False)
        assert long.returncode == 2
        assert (
            "optimizer.decay_steps: 5 are more than the 2 steps left (4 of 6 are trained)" in long.stdout + long.stderr
        )
    assert (
        "resolved.yaml: cannot be read, so what this start changes"
        in stamo("train", recipe, "--set", "train.steps=5").stdout
    )
