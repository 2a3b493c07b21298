"""What a card says of opening the model runs as it is, without network and without the training's folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import write_recipe
from toy_policy import make_policy_data, write_diffusion_recipe, write_policy_recipe

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.export_layout import WHOLE
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.publish.usage import usage
from stamo_dist.recipe.load import load

#: With a torchvision that was built for another torch, plain transformers opens nothing.
HIDE_BROKEN = "import stamo_dist._torchvision\n"


def run_card(folder: Path, hidden: Path) -> list[str]:
    """Run each block of Python of the card in the folder by itself, while `hidden` is not there; returns the blocks."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    away = hidden.rename(hidden.with_name("away"))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        for block in blocks:
            done = subprocess.run(
                [sys.executable, "-c", HIDE_BROKEN + block],
                check=False,
                cwd=folder,
                env=env,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{block}\n{done.stderr}"
    finally:
        away.rename(hidden)
    return blocks


@pytest.mark.parametrize("stage", ["tokenizer", "vae"])
def test_a_card_says_what_the_libraries_alone_need(tmp_path: Path, toy, stage: str) -> None:
    recipe = load(write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), [f"stage={stage}"]).recipe
    text = usage(recipe, WHOLE, tmp_path)
    assert "need a torchvision that was built for the installed torch, or none" in text.rpartition("```")[2]


def no_pickles(folder: Path) -> bool:
    return not [p for p in folder.rglob("*") if p.suffix in (".pt", ".bin", ".pth", ".pkl")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_data(tmp_path_factory.mktemp("usage") / "data")


def test_a_policy_opens_as_its_card_says(data: Path, ranks, tmp_path: Path) -> None:
    recipe = write_policy_recipe(tmp_path / "toy.yaml", data, actions="regression", proprio=True)
    ranks(1, "train", recipe, "--set", "train.steps=1")
    out = tmp_path / "out"
    ranks(1, "export", tmp_path / "run", out)
    assert no_pickles(out)
    blocks = run_card(out, data)
    assert any("AutoModelForCausalLM" in block for block in blocks)
    assert "need a torchvision that was built for the installed torch" in (out / "README.md").read_text()
    assert any("proprio=np.zeros(2)" in block for block in blocks)
    kept = StateEncoder.from_pretrained(out / "state_encoder")
    assert kept.fingerprint == StateEncoder.from_pretrained(data / "tokenizer").fingerprint


def test_a_diffusion_policy_opens_as_its_card_says(data: Path, ranks, tmp_path: Path) -> None:
    recipe = write_diffusion_recipe(tmp_path / "toy.yaml", data)
    ranks(1, "train", recipe, "--set", "train.steps=1")
    ranks(1, "export", tmp_path / "run", tmp_path / "out")
    assert no_pickles(tmp_path / "out")
    assert len(run_card(tmp_path / "out", data)) == 2


def test_a_tokenizer_with_a_frozen_encoder_opens_as_its_card_says(toy, ranks, tmp_path: Path) -> None:
    vae = shutil.copytree(toy.vae, tmp_path / "away_later" / "vae")
    encoder = tmp_path / "away_later" / "encoder"
    make_encoder(encoder)
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, vae)
    trained = re.compile(r"    train: true\n    config: .*\n")
    recipe.write_text(trained.sub(f"    weights: {encoder}\n", recipe.read_text(), count=1))
    ranks(1, "train", recipe, "--set", "train.steps=1")
    run, out = Path(load(recipe).recipe.run_dir), tmp_path / "out"
    ranks(1, "export", run, out)
    assert not (run / "model" / "encoder").exists(), "the run's own export names it"
    assert no_pickles(out)
    assert len(run_card(out, vae.parent)) == 2
    assert Tokenizer.from_pretrained(out).fingerprint() == Tokenizer.from_pretrained(run).fingerprint()


def make_encoder(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    Dinov2Model(
        Dinov2Config(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(folder)


def test_a_vae_opens_as_its_card_says(toy, ranks, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    ranks(1, "train", recipe, "--set", "train.steps=1", "--set", "stage=vae")
    ranks(1, "export", tmp_path / "run", tmp_path / "out")
    assert no_pickles(tmp_path / "out")
    assert len(run_card(tmp_path / "out", tmp_path / "run")) == 1
    assert json.loads((tmp_path / "out/config.json").read_text())["_class_name"] == "AutoencoderKL"
