"""Which commit of the hub a run began with: in its folder, in its checkpoints, and on the card of what is exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from toy import write_recipe

from stamo_dist.checkpoint.manifest import read_checkpoint_manifest
from stamo_dist.checkpoint.retention import complete
from stamo_dist.recipe.load import load

COMMIT = "c" * 40


def test_the_commit_is_recorded_and_kept(stamo, toy, tmp_path: Path, monkeypatch) -> None:
    repo = tmp_path / "hub" / "models--org--vae"
    shutil.copytree(toy.vae, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, "org/vae", strategy="ddp")
    stamo("train", recipe, "--set", "train.steps=2")
    run, found = tmp_path / "run", f"org/vae@{COMMIT}"
    assert json.loads((run / "env.json").read_text())["weights"] == {"model.vae.weights": found}
    assert load(run / "resolved.yaml").recipe.model.vae.weights == found
    assert read_checkpoint_manifest(complete(run / "checkpoints")[0][0]).sources == {"model.vae.weights": found}
    assert json.loads((run / "model" / "stamo.json").read_text())["model"]["vae"]["weights"] == found

    (repo / "refs" / "main").write_text("d" * 40)  # which is not here: what is exported still asks for the first
    stamo("export", run, tmp_path / "out")
    assert f"| model.vae.weights | {found} |" in (tmp_path / "out" / "README.md").read_text()
    more = stamo("train", recipe, "--set", "train.steps=3")
    assert f"model.vae.weights: {found}, the commit that this run began with" in more.stdout
    shutil.rmtree(repo / "snapshots" / COMMIT)
    lacking = stamo("train", recipe, "--set", "train.steps=4", check=False)
    assert lacking.returncode == 2
    assert f"model.vae.weights: there is no folder {found}" in lacking.stdout + lacking.stderr
