"""What `train`, `submit`, `doctor` and `recipe check` refuse of a recipe and its data: the same, all at once."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import make_source, write_recipe
from typer.testing import CliRunner

from stamo_dist.cli.app import app
from stamo_dist.data import at_hand
from stamo_dist.errors import RecipeError
from stamo_dist.launch.recipe_checks import Scope, look
from stamo_dist.recipe.load import load, load_draft


@pytest.fixture
def recipe(toy: SimpleNamespace, tmp_path: Path) -> Path:
    """Of two sources of its own: 32 px, 12 frames an episode, camera front, splits train and val."""
    for name in ("a", "b"):
        make_source(tmp_path / "shards", name, episodes=5)
    return write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", toy.vae)


WRONG = {
    "data.image_size=64": "has frames of 32 px, but data.image_size is 64",
    "data.sources.a.cameras=[frnt]": "{shards}/a: has no camera 'frnt', only front; did you mean front?",
    "data.sources.a.split=tset": "data.sources.a: {shards}/a: has no split 'tset', only train, val",
    "data.sources.b.path=nowhere": "data.sources.b: nowhere: no such folder",
    "data.horizon=40": "data.horizon: 40 frames, but the longest episode of all sources has 12",
}


@pytest.mark.parametrize("setting", WRONG)
def test_every_command_refuses_what_training_refuses(recipe: Path, stamo: Any, setting: str) -> None:
    expected = WRONG[setting].format(shards=recipe.parent / "shards")
    for command in (
        ("train", recipe),
        ("submit", recipe, "--cluster", "local", "--dry-run"),
        ("doctor", recipe, "--no-job", "--json"),
        ("recipe", "check", recipe),
    ):
        done = stamo(*command, "--set", setting, check=False)
        assert done.returncode == (1 if command[0] == "doctor" else 2), command
        assert expected in done.stdout + done.stderr, command
    assert not (recipe.parent / "run").exists()
    assert stamo("recipe", "check", recipe, "--offline", "--set", setting).stdout.startswith("OK")


def test_a_damaged_shard_and_a_batch_that_does_not_divide_are_said_together(recipe: Path) -> None:
    shard = recipe.parent / "shards" / "a" / "train" / "front" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:100])
    (recipe.parent / "shards" / "b" / "train" / "episodes.jsonl").unlink()
    problems = look(load_draft(recipe), Scope(world_size=7)).problems
    assert len(problems) == 3
    for problem, expected in zip(
        problems,
        ("not divisible by 7", "shard.00000.mds (100 bytes, index.json says", "episodes.jsonl: missing"),
        strict=True,
    ):
        assert problem.startswith(f"{recipe}:")
        assert expected in problem
    assert all("`stamo data convert` with the same arguments makes it anew" in problem for problem in problems[1:])


def test_a_parent_of_another_stage_and_a_mistyped_one_are_said(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    parent = tmp_path / "runs/vae"
    (parent / "model").mkdir(parents=True)
    (parent / "resolved.yaml").write_text("stage: vae\n")
    for given in ("runs/vae", "runs/vae/model"):
        (problem,) = look(load_draft(recipe, [f"init_from={given}"])).problems
        assert problem == (
            f"--set init_from: init_from.path: {given} is of the vae stage, and the recipe trains the tokenizer; "
            f"model.vae.weights: runs/vae names its VAE"
        )
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    field = "--set init_from: init_from.path: runz/vae is no folder here (did you mean runs/vae?)"
    mistyped = load_draft(recipe, ["init_from=runz/vae"])
    assert f"{field}, and is taken for a repository of the Hub" in look(mistyped).notes
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (problem,) = look(mistyped).problems
    assert problem.startswith(f"{field}, nor in the hub's cache, and HF_HUB_OFFLINE is set; `hf download runz/vae`")
    commit = tmp_path / "hub" / "models--runz--vae" / "snapshots" / ("a" * 40)
    for file, text in ((commit / "stamo.json", "{}"), (commit.parents[1] / "refs" / "main", commit.name)):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    looked = look(mistyped)
    assert looked.problems == []
    assert f"{field}, and is taken for a repository of the Hub" in looked.notes


def test_mistyped_weights_suggest_the_folder(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "runs/vae").mkdir(parents=True)
    for offline, given, hint in (
        ("0", "runz/vae", " (did you mean runs/vae?)"),
        ("1", "runz/vea@main", " (did you mean runs/vae?)"),
        ("1", "runz/none", " (did you mean runs/none?)"),
        ("1", "lab/vae", ""),
    ):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        looked = look(load_draft(recipe, [f"model.vae.weights={given}"]))
        said = [f"{field}: {what}; {fix}" for field, what, fix in looked.to_download] or looked.problems
        assert bool(looked.problems) == (offline == "1")
        assert said[0].startswith(f"--set model.vae.weights: {given} is not in the hub's cache{hint}")


def test_the_option_that_gave_a_value_is_named(recipe: Path) -> None:
    for setting, expected in (
        ("data.sources.b.path=gone", "--set data.sources.b.path: data.sources.b: gone: no such folder"),
        ("data={sources: {b: {path: gone}}}", "--set data: data.sources.b: gone: no such folder"),
        ("model.vae.weights=gone", "--set model.vae.weights: there is no folder gone"),
        ("model.vae={weights: gone}", "--set model.vae: model.vae.weights: there is no folder gone"),
    ):
        (problem,) = look(load_draft(recipe, [setting])).problems
        assert problem.startswith(expected)
    for command in (["train", str(recipe), "--nproc", "3"], ["recipe", "check", str(recipe), "--world-size", "3"]):
        refused = CliRunner().invoke(app, command).exception
        assert isinstance(refused, RecipeError)
        (problem,) = refused.problems
        assert problem.startswith(f"{' '.join(command[-2:])}: {recipe}:22: train.global_batch: 8 is not divisible by 3")


@pytest.mark.parametrize(
    ("below", "why"),
    [
        ("/proc/x", "/proc is the kernel's, and holds no files"),
        ("{}/toy.yaml/run", "{}/toy.yaml is no folder"),
        ("{}/" + "x" * 300, "File name too long"),
    ],
)
def test_a_run_folder_that_cannot_be_made_is_said(recipe: Path, tmp_path: Path, below: str, why: str) -> None:
    there, before = below.format(tmp_path), sorted(tmp_path.rglob("*"))
    (problem,) = look(load_draft(recipe, [f"run_dir={there}"])).problems
    assert problem == f"--set run_dir: {there}: {why.format(tmp_path)}; choose another with --set run_dir=…"
    assert sorted(tmp_path.rglob("*")) == before
    assert look(load_draft(recipe, [f"run_dir={there}"]), Scope(offline=True)).problems == []


def test_a_run_does_not_begin_with_itself(recipe: Path) -> None:
    run = recipe.parent / "run"
    for below in ("checkpoints/step_00000010", "model"):
        (run / below).mkdir(parents=True)
    for given in (run, run / "model", f"{run}/../run/checkpoints/step_00000010"):  # also where it is finished
        (problem,) = look(load_draft(recipe, [f"init_from={given}"])).problems
        assert problem == (
            f"--set init_from: init_from.path: {Path(given).resolve()} is of this run itself; leave it out to go on, "
            "or choose another run_dir"
        )


def test_the_demo_makes_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, command in (("tokenizer_demo", "stamo demo"), ("policy_metaworld_demo", "stamo demo --policy")):
        said = next(problem for problem in look(load_draft(name)).problems if "data.sources." in problem)
        assert said.endswith(
            f"no such folder in {tmp_path}; convert a dataset into it with `stamo data convert`; `{command}` makes it"
        )


def test_a_warm_up_longer_than_the_run_is_noted(recipe: Path) -> None:
    looked = look(load_draft(recipe, ["optimizer.warmup_steps=500", "train.steps=20"]))
    assert looked.problems == []
    assert looked.notes == [
        "--set optimizer.warmup_steps: 500 steps of warm-up in a run of 20: it never reaches optimizer.lr"
    ]
    assert look(load_draft(recipe, ["optimizer.warmup_steps=5", "train.steps=20"])).notes == []
    wsd = ["optimizer.schedule=wsd", "optimizer.decay_steps=15", "train.steps=20"]
    assert look(load_draft(recipe, [*wsd, "optimizer.warmup_steps=5"])).notes == []
    assert look(load_draft(recipe, [*wsd, "optimizer.warmup_steps=8"])).notes == [
        "--set optimizer.decay_steps: 15 are more than the 12 steps after the warm-up: it is shorter"
    ]


def test_a_pipeline_is_no_recipe(stamo: Any) -> None:
    for command in (("recipe", "check"), ("train",)):
        refused = stamo(*command, "recipes/pipelines/demo.yaml", check=False)
        assert refused.returncode == 2
        assert "is a pipeline, no recipe: `stamo submit recipes/pipelines/demo.yaml" in refused.stderr


def test_a_folder_that_is_no_source_says_what_it_is(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        data = load("recipes/tokenizer_demo.yaml", [f"data.sources.libero.path={path}"]).recipe.data
        return next(misfit.text for misfit in at_hand.look(data) if misfit.text.startswith("data.sources.libero:"))

    dataset = tmp_path / "dataset"
    dataset.mkdir()
    assert "is empty; convert a dataset into it" in said(dataset)
    (dataset / "demo.hdf5").write_bytes(b"x")
    assert "a dataset itself is not read: convert it into another folder" in said(dataset)
    (tmp_path / ".half.partial").mkdir()
    assert "its conversion never finished; run the same `stamo data convert` again, it resumes" in said(
        tmp_path / "half"
    )


def test_what_has_to_be_encoded_first_is_refused_before_anything_is_built(recipe: Path, stamo: Any, ranks: Any) -> None:
    cached = ("--set", "data.latents=cached", "--set", "data.augment.brightness=0")
    shards, command = recipe.parent / "shards", f"run `stamo encode {recipe} {' '.join(cached)}`"
    for verb in (("recipe", "check"), ("train",), ("submit", "--cluster", "local")):
        refused = stamo(*verb, recipe, *cached, check=False)
        assert refused.returncode == 2
        assert (
            f"no latents of all shards in {shards}/a/train/front, {shards}/b/train/front; {command}" in refused.stderr
        )
    code, said = ranks(1, "train", recipe, *cached, check=False)  # as torchrun starts it
    assert code == 2
    assert command in said
    stamo("encode", recipe, *cached)
    assert stamo("recipe", "check", recipe, *cached).stdout.startswith("OK")
    next((shards / "b").rglob("latents-*/shard.00000.json")).unlink()
    assert f"in {shards}/b/train/front; {command}" in stamo("recipe", "check", recipe, *cached, check=False).stderr
    (recipe.parent / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)  # it goes on with what it began with
    assert stamo("recipe", "check", recipe, *cached).stdout.startswith("OK")


TOGETHER = {
    "optimizer.lr=-1": "optimizer.lr: must be a number above 0, not -1",
    "model.compressor.heads=3": "model.compressor.heads: 3 must divide width 32",
    "flow.std=0": "flow.std: must be",
    "train.global_batch=x": "train.global_batch: must be",
    "strategy.name=dpp": "strategy.name: must be",
    "tracking.wandb=on": "tracking.wandb: must be",
    "evaluate.every=7": "evaluate",  # against another section
    "data.workers=-1": "data.workers: must be",
    "data.sources.c.weight=-1": "data.sources.c.weight",
    "optimiser.lr=1": "optimiser: no such field",
}


@pytest.mark.parametrize("wrong", TOGETHER)
def test_a_wrong_field_hides_nothing_of_the_data(recipe: Path, toy: SimpleNamespace, wrong: str) -> None:
    draft = load_draft(recipe, [*WRONG, "model.vae.weights=nowhere.safetensors", "data.sources.c.path=c", wrong])
    problems = look(draft).problems
    shards = recipe.parent / "shards"
    for setting, text in WRONG.items():
        expected = text.format(shards=shards)
        if setting == "data.horizon=40":  # needs every source
            continue
        assert any(expected in problem for problem in problems), (expected, problems)
    assert any(TOGETHER[wrong] in problem for problem in problems), problems
    assert any("model.vae.weights: there is no folder nowhere.safetensors" in problem for problem in problems)
    assert len(set(problems)) == len(problems)


def test_what_depends_on_a_wrong_value_is_not_said(recipe: Path) -> None:
    for settings in (
        ["data.image_size=big"],
        ["data.imagesize=32", "data.image_size=null"],
        ["data.sources.a.path=[]", "data.sources.a.split=3"],
        ["data=5"],
        ["stage=tokeniser", "data.sources.a.cameras=[front]"],
    ):
        draft = load_draft(recipe, settings)
        assert draft.problems
        assert look(draft).problems == draft.problems, settings


def test_submit_says_together_what_does_not_divide_and_what_is_missing(recipe: Path, stamo: Any) -> None:
    wrong = ("--set", "train.global_batch=7", "--set", "data.sources.b.path=nowhere")
    refused = stamo("submit", recipe, "--cluster", "local", "--gpus-per-node", "2", *wrong, check=False)
    assert refused.returncode == 2
    assert "train.global_batch" in refused.stderr
    assert "nowhere: no such folder" in refused.stderr
    wrong = ("--set", "optimizer.lr=-1", *wrong[2:])
    for command in (("train",), ("submit", "--cluster", "local"), ("doctor", "--no-job"), ("recipe", "check")):
        refused = stamo(*command, recipe, *wrong, check=False)
        assert "optimizer.lr: must be" in refused.stderr, command
        assert "nowhere: no such folder" in refused.stderr, command


def test_a_tracker_that_is_not_installed_is_said(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = load_draft(recipe, ["tracking.tensorboard=true"])
    assert look(draft).problems == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = look(draft).problems
    assert problem.startswith("--set tracking.tensorboard: the package tensorboard is not installed; ")
    assert "install" in problem
    assert look(load_draft(recipe)).problems == []


def test_an_export_older_than_its_run_is_noted(recipe: Path, toy: SimpleNamespace, tmp_path: Path) -> None:
    run = tmp_path / "vae"
    shutil.copytree(toy.vae, run / "model")
    draft = load_draft(recipe, [f"model.vae.weights={run}"])
    (run / "exported.json").write_text('{"step": 10}')
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    (run / "checkpoints" / "step_00000010" / "checkpoint.json").touch()
    assert look(draft).notes == []
    (run / "checkpoints" / "step_00000020").mkdir(parents=True)
    (run / "checkpoints" / "step_00000020" / "checkpoint.json").touch()
    assert look(draft).notes == [
        f"--set model.vae.weights: {run} was exported after step 10, and its run has a checkpoint of step 20; "
        f"`stamo export {run}` exports that"
    ]
