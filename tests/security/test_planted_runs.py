"""A run folder or an export from somebody else is read without running what it holds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from payload import Payload, planted, works
from PIL import Image
from toy import write_recipe

#: Files that others keep pickles in, below a run: submitit's, torch's, W&B's, ours of old.
PICKLES = (
    "7_submitted.pkl", "logs/7_0_result.pkl", "submitit/7_submitted.pkl", "wandb/latest-run/files/model.pkl",
    "checkpoints/step_00000002/state.pt", "checkpoints/step_00000002/dcp/.metadata", "profile/memory_00000001.pickle",
    "model/pytorch_model.bin", "model/encoder/pytorch_model.bin", "model/training_args.bin", "compiled/gpu_00.bin",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, toy: SimpleNamespace, stamo: Callable[..., Any]) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("planted") / "toy.yaml", toy.shards, toy.vae)
    stamo("train", recipe, "--set", "train.steps=2", "--set", "train.checkpoint.every=2")
    return recipe


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> SimpleNamespace:
    folder = shutil.copytree(trained.parent, tmp_path / "copy")
    recipe = folder / "toy.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained.parent), str(folder)))
    mark = tmp_path / "mark"
    works(mark)
    return SimpleNamespace(folder=folder / "run", recipe=recipe, mark=mark)


def rehash(checkpoint: Path) -> None:
    """Let a checkpoint's manifest fit its files again."""
    path = checkpoint / "checkpoint.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "digest": f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def test_pickles_beside_what_is_read(run: SimpleNamespace, stamo: Callable[..., Any], tmp_path: Path) -> None:
    for name in PICKLES:
        path = run.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(planted(run.mark))
    for command in (
        ["status", run.folder],
        ["report", run.folder],
        ["runs", run.folder.parent],
        ["export", run.folder, tmp_path / "out"],
        ["eval", "reconstruct", run.folder, "--frames", "2"],
        ["train", run.recipe, "--set", "train.steps=4", "--set", "train.checkpoint.every=2"],
        ["serve", run.folder, "--port", "0"],
    ):
        done = stamo(*command, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert not run.mark.exists(), command
        assert (done.returncode == 0) == (command[0] != "serve"), (command, done.stdout, done.stderr)
    assert "trains the tokenizer stage; give the run folder of a policy" in " ".join(done.stderr.split())


def test_a_checkpoint_s_index_of_objects(run: SimpleNamespace, stamo: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = run.folder / "checkpoints/step_00000002"
    np.save(checkpoint / "state/pieces.npy", np.array([Payload(run.mark)], object), allow_pickle=True)
    rehash(checkpoint)
    for command in (["export", run.folder, tmp_path / "out"], ["train", run.recipe]):
        done = stamo(*command, check=False)
        assert done.returncode, done.stdout
        assert "pieces.npy are not what this version writes" in " ".join((done.stderr + done.stdout).split())
        assert not run.mark.exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth"])
def test_weights_of_torch_save(tmp_path: Path, name: str) -> None:
    from stamo_dist.errors import CheckpointError
    from stamo_dist.models.weights import unpickled

    mark = tmp_path / "mark"
    torch.save({"w": torch.ones(2), "x": Payload(mark)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=name):
        unpickled(tmp_path / name, "model.encoder.weights")
    assert not mark.exists()


@pytest.mark.parametrize("file", ["resolved.yaml", "recipe.yaml"])
def test_yaml(run: SimpleNamespace, stamo: Callable[..., Any], file: str) -> None:
    path = run.folder / file
    path.write_text(f"name: !!python/object/apply:os.mkdir [{str(run.mark)!r}]\n" + path.read_text())
    for command in (["status", run.folder], ["report", run.folder]):
        stamo(*command, check=False)
        assert not run.mark.exists(), command
    run.recipe.write_text(f"name: !!python/object/apply:os.mkdir [{str(run.mark)!r}]\n")
    assert stamo("train", run.recipe, check=False).returncode == 2
    assert not run.mark.exists()


def test_a_report_shows_templates_and_markup_as_text(run: SimpleNamespace, tmp_path: Path) -> None:
    from stamo_dist.errors import RunError
    from stamo_dist.report.page import write_report

    evil = "{{ 7 * 191 }}{% include '/etc/passwd' %}<script>alert(1)</script>"
    folder = run.folder / "eval/evil"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "private.png")
    result = {
        "title": evil, "about": evil, "columns": {"a": evil}, "rows": [{"a": evil}], "notes": [evil],
        "settings": {evil: evil}, "provenance": {evil: evil},
        "figures": [{"file": "a.png", "title": evil, "caption": evil}],
    }  # fmt: skip
    (folder / "evil.json").write_text(json.dumps(result))
    page = write_report([run.folder]).read_text()
    assert "<script>alert" not in page
    assert "1337" not in page
    assert "{{ 7 * 191 }}" in page
    for outside in (str(tmp_path / "private.png"), "../../../../private.png"):
        result["figures"][0]["file"] = outside  # type: ignore[index]
        (folder / "evil.json").write_text(json.dumps(result))
        with pytest.raises(RunError, match=r"private\.png lies outside of"):
            write_report([run.folder])
