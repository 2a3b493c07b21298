"""Revisions of the hub's cache, and what a login node finds wrong with weights, from their headers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import DINO, IMAGE, shake
from toy import write_recipe

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from transformers import Dinov2Config, Dinov2Model

from stamo_dist.errors import CheckpointError
from stamo_dist.models.encoder import Encoder
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.pretrained.pin import as_begun, moved, pin
from stamo_dist.pretrained.place import hub_id
from stamo_dist.pretrained.wanted import look_at
from stamo_dist.recipe import schema

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without network: org/dino at two commits, main is the newer one; org/empty without any file."""
    cache = tmp_path / "hub"
    repo = cache / "models--org--dino"
    for commit in (OLD, NEW):
        shake(Dinov2Model(Dinov2Config(**DINO))).save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(NEW)
    (cache / "models--org--empty" / "refs").mkdir(parents=True)
    (cache / "models--org--empty" / "refs" / "main").write_text(NEW)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def stored(hub: Path, commit: str) -> torch.Tensor:
    return Dinov2Model.from_pretrained(hub / "models--org--dino" / "snapshots" / commit).layernorm.weight


@pytest.mark.parametrize(("named", "commit"), [("org/dino", NEW), (f"org/dino@{OLD}", OLD), ("org/dino@main", NEW)])
def test_the_revision_that_is_asked_for_is_read_and_known(hub: Path, named: str, commit: str) -> None:
    encoder = Encoder.from_config(schema.EncoderConfig(weights=named, image_size=42))
    assert torch.equal(encoder.model.layernorm.weight, stored(hub, commit))
    assert encoder.report is not None
    assert encoder.report.source == f"org/dino@{commit}"


def test_an_unknown_revision_says_how_to_get_it(hub: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`hf download org/dino --revision v2 --local-dir DIR`"):
        Encoder.from_config(schema.EncoderConfig(weights="org/dino@v2"))


def test_an_export_asks_for_the_commit_that_it_was_trained_on(
    hub: Path, model_cfg: Callable[..., schema.Model], tmp_path: Path
) -> None:
    cfg = model_cfg()
    cfg = cfg.model_copy(update={"encoder": cfg.encoder.model_copy(update={"weights": "org/dino"})})
    tokenizer = Tokenizer.from_config(cfg, schema.Flow(sampler_steps=2), IMAGE)
    tokenizer.save_pretrained(tmp_path / "out")
    about = json.loads((tmp_path / "out" / "stamo.json").read_text())
    assert about["model"]["encoder"]["weights"] == f"org/dino@{NEW}"
    assert about["model"]["vae"]["weights"] == cfg.vae.weights
    (hub / "models--org--dino" / "refs" / "main").write_text(OLD)  # the branch moves on
    again = Tokenizer.from_pretrained(tmp_path / "out")
    assert torch.equal(again.encoder.model.layernorm.weight, stored(hub, NEW))
    again.save_pretrained(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "stamo.json").read_text())["model"] == about["model"]


def recipe(official: Path, **parts: dict[str, Any]) -> schema.Recipe:
    """On the official weights but for `parts`."""
    model: dict[str, Any] = {
        "encoder": {"weights": str(official / "dino"), "image_size": 42},
        "decoder": {"weights": str(official / "sd3")}, "vae": {"weights": str(official / "sd3")},
    }  # fmt: skip
    for part, changes in parts.items():
        model[part] |= changes
    data = {"sources": {"a": {"path": "a"}}, "image_size": IMAGE}
    return schema.Recipe.model_validate({"data": data, "model": model, "train": {"steps": 1}})


def test_a_pinned_recipe_names_the_commits(official: Path) -> None:
    given = recipe(official, encoder={"weights": "org/dino"}, vae={"weights": "org/vae@v1"})
    sources = {"model.encoder.weights": f"org/dino@{OLD}", "model.vae.weights": f"org/vae@{NEW}"}
    found = pin(given, sources | {"model.decoder.weights": "/elsewhere"}).model
    assert (found.encoder.weights, found.vae.weights) == (f"org/dino@{OLD}", f"org/vae@{NEW}")
    assert found.decoder.weights == given.model.decoder.weights


#: As `python -m stamo_dist.cli`, but the branch moves on before the model is exported.
MOVING = """
import os, sys
import stamo_dist.train
from pathlib import Path
export = stamo_dist.train.export
def moving(*arguments):
    Path(os.environ["HF_HUB_CACHE"], "models--org--vae/refs/main").write_text("b" * 40)
    export(*arguments)
stamo_dist.train.export = moving
from stamo_dist.cli import main
main()
"""


def test_a_run_goes_on_with_the_commit_it_began_with(
    toy: SimpleNamespace, stamo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "hub/models--org--vae"
    shutil.copytree(toy.vae, repo / "snapshots" / OLD)
    shutil.copytree(toy.vae, repo / "snapshots" / NEW)
    weights = repo / "snapshots" / NEW / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(OLD)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    toy_recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    hub_vae = ("--set", "model.vae.weights=org/vae")
    command = [sys.executable, "-c", MOVING, "train", str(toy_recipe), *hub_vae, "--set", "train.steps=2"]
    subprocess.run(command, check=True, timeout=300)
    assert (repo / "refs/main").read_text() == NEW
    exported = json.loads((tmp_path / "run/model/stamo.json").read_text())
    assert exported["model"]["vae"]["weights"] == f"org/vae@{OLD}"
    more = stamo("train", toy_recipe, *hub_vae, "--set", "train.steps=3", "--nproc", "2")
    assert f"model.vae.weights: org/vae@{OLD}, the commit that this run began with" in more.stdout
    assert f"org/vae@{OLD}" in (tmp_path / "run/resolved.yaml").read_text()


def test_what_a_checkpoint_says_where_the_recipe_names_no_revision(official: Path) -> None:
    began = {"model.encoder.weights": f"org/dino@{OLD}", "model.vae.weights": f"org/vae@{OLD}"}
    found, notes = as_begun(recipe(official, encoder={"weights": "org/dino"}, vae={"weights": "org/other"}), began)
    assert (found.model.encoder.weights, found.model.vae.weights) == (f"org/dino@{OLD}", "org/other")
    assert notes == [f"model.encoder.weights: org/dino@{OLD}, the commit that this run began with"]
    found, notes = as_begun(recipe(official, encoder={"weights": f"org/dino@{NEW}"}), began)
    assert found.model.encoder.weights == f"org/dino@{NEW}"
    assert notes == []
    now = {"model.encoder.weights": f"org/dino@{NEW}", "model.vae.weights": "/here"}
    assert moved(now, began) == [f"model.encoder.weights: org/dino@{NEW}, but this run began with org/dino@{OLD}"]


def problems(official: Path, environ: dict[str, str] | None = None, **parts: dict[str, Any]) -> list[str]:
    looked = look_at(recipe(official, **parts), environ or {})
    return [p for found in looked.problems.values() for p in found]


def test_the_right_weights_are_fine_and_wrong_ones_are_named(official: Path) -> None:
    vae, transformer = str(official / "sd3" / "vae"), str(official / "sd3" / "transformer")
    assert problems(official) == []
    for part, weights, words in (
        ("decoder", vae, "says _class_name AutoencoderKL, expected SD3Transformer2DModel"),
        ("vae", transformer, "says _class_name SD3Transformer2DModel, expected AutoencoderKL"),
        ("encoder", vae, "says model_type None, expected dinov2"),
        ("encoder", "/no/such", "there is no folder /no/such"),
    ):
        (found,) = problems(official, **{part: {"weights": weights}})
        assert found.startswith(f"model.{part}.weights: ")
        assert words in found
        assert "\n" not in found
    (found,) = problems(official, encoder={"config": {"hidden_size": 768, "patch_size": 14}})
    assert found.startswith("model.encoder.config.hidden_size: 768, but ")
    assert "has 32" in found
    (found,) = problems(official, encoder={"image_size": 40})
    assert found.startswith("model.encoder.image_size: 40 is no multiple of the patch size 14")


def test_headers_that_are_not_those_of_config_json_are_named(official: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(official / "dino", tmp_path / "dino"))
    config = json.loads((other / "config.json").read_text())
    for key, value, words in (
        ("hidden_size", 64, "has embeddings.cls_token [1, 1, 32], its config.json asks for [1, 1, 64]"),
        ("num_hidden_layers", 3, "has no encoder.layer.2.attention"),
        ("num_hidden_layers", 1, "its config.json asks for none"),
    ):
        (other / "config.json").write_text(json.dumps({**config, key: value}))
        (found,) = problems(official, encoder={"weights": str(other)})
        assert found.startswith(f"model.encoder.weights: {other} ")
        assert words in found
    (other / "config.json").write_text(json.dumps(config))
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-8])
    (found,) = problems(official, encoder={"weights": str(other)})
    assert f"is corrupt or incomplete ({len(weights) - 8:,} bytes of {len(weights):,})" in found
    pickled = tmp_path / "dino.pth"
    torch.save({"cls_token": 0, "pos_embed": 0, "blocks.0.attn.qkv.weight": 0}, pickled)
    assert problems(official, encoder={"weights": str(pickled)}) == []
    (found,) = problems(official, vae={"weights": str(pickled)})
    assert "does not hold that model" in found
    pickled.write_bytes(pickled.read_bytes()[:-40])
    (found,) = problems(official, encoder={"weights": str(pickled)})
    assert "dino.pth is corrupt, incomplete" in found


def test_an_empty_cache_is_found_for_the_environment_of_the_job(hub: Path, official: Path) -> None:
    here = {"HF_HUB_CACHE": str(hub)}
    for weights, environ, command in (
        (f"org/dino@{OLD}", here, None),
        ("org/dino", here, None),
        ("org/dino@v2", here, "hf download org/dino --revision v2"),
        ("org/empty", here, "hf download org/empty"),
        ("org/dino", {"HF_HOME": str(official)}, "hf download org/dino"),
    ):
        looked = look_at(recipe(official, encoder={"weights": weights}), environ)
        assert not any(looked.problems.values())
        assert looked.absent == ({} if command is None else {"model.encoder.weights": (weights, command)})


def test_none_of_it_needs_torch(official: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(recipe(official, decoder={"weights": "/nowhere"}).model_dump_json())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from stamo_dist.launch import recipe_checks\n"
        "from stamo_dist.pretrained.wanted import look_at\n"
        "from stamo_dist.recipe.schema import Recipe\n"
        "print(look_at(Recipe.model_validate_json(open(sys.argv[1]).read())).problems['model.decoder.weights'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "recipe.json"], check=True, capture_output=True, text=True
    )
    assert "there is no folder /nowhere" in done.stdout


def test_a_run_to_come_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/dino@main") == ("org/dino", "main")
    assert hub_id("runs/vae") is None
    with pytest.raises(CheckpointError, match="there is no folder runs/vae; train that run first"):
        Encoder.from_config(schema.EncoderConfig(weights="runs/vae"))
