from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stamo_dist.errors import CheckpointError
from stamo_dist.models.vae import VAE
from stamo_dist.models.weights import fingerprint
from stamo_dist.pretrained.files import header
from stamo_dist.pretrained.place import locate
from stamo_dist.pretrained.reading import read_json
from stamo_dist.recipe import schema

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(official: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(official / "sd3" / "vae", tmp_path / "vae"))


def load(folder: Path) -> VAE:
    return VAE.from_config(schema.VAEConfig(weights=str(folder)), 32)


def test_every_misfit_is_listed_at_once(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    tensors["encoder.conv_in.weight"] = torch.zeros(8, 3, 5, 5)
    tensors["encoder.conv_inn.bias"] = tensors.pop("encoder.conv_in.bias")
    save_file(tensors, folder / FILE)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = str(error.value)
    assert "model.vae.weights" in message
    assert "encoder.conv_in.weight: [8, 3, 5, 5] in the checkpoint, [8, 3, 3, 3] in the model" in message
    assert "missing in the checkpoint: encoder.conv_in.bias" in message
    assert "unknown to the model: encoder.conv_inn.bias" in message


def test_truncated_file_is_named(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{FILE} is corrupt or incomplete .* copy or download it again"):
        load(folder)


def test_a_file_of_somebody_else_is_not_called_corrupt(folder: Path) -> None:
    (folder / FILE).chmod(0)
    with (
        _nobody(),
        pytest.raises(CheckpointError, match=rf"{FILE} cannot be read \(Permission denied\): have"),
    ):
        header(folder / FILE, "model.vae.weights")
    (folder / "config.json").chmod(0)
    with _nobody(), pytest.raises(CheckpointError, match=r"config.json cannot be read \(Permission denied\): have its"):
        read_json(folder / "config.json", "model.vae.weights")


@contextlib.contextmanager
def _nobody() -> Iterator[None]:
    """As a user who may read what everybody may; root may read everything."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if me == 0:
            os.seteuid(0)


def test_missing_shards_and_pickles_are_refused(folder: Path) -> None:
    (folder / FILE).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.bin is pickle, which is never opened"):
        load(folder)
    index = {"weight_map": {"a": "part-1.safetensors", "b": "../part-2.safetensors"}}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not there: \.\./part-2.safetensors, part-1.safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load(folder)


def test_what_cannot_be_found_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"there is no folder /no/such/place; give an existing folder or file, or a hub"
    ):
        locate("/no/such/place", ("vae", ""), "model.vae.weights")
    with pytest.raises(CheckpointError, match=r"there is no vae/config.json or config.json in "):
        locate(str(tmp_path), ("vae", ""), "model.vae.weights")
    (tmp_path / "resolved.yaml").touch()
    with pytest.raises(CheckpointError, match=r"that run has not finished"):
        locate(str(tmp_path), ("vae", ""), "model.vae.weights")
    with pytest.raises(
        CheckpointError, match=r"hf download stamo/none --local-dir DIR` and set model.vae.weights: DIR"
    ):
        locate("stamo/none", ("vae", ""), "model.vae.weights")


def test_fingerprint_sees_every_part_and_no_order() -> None:
    state = {"a": torch.arange(3.0), "b": torch.tensor(1)}
    base = fingerprint({"x": 1}, state)
    assert fingerprint({"x": 1}, dict(reversed(state.items()))) == base
    others = [
        fingerprint({"x": 2}, state),
        fingerprint({"x": 1}, {**state, "b": torch.tensor(2)}),
        fingerprint({"x": 1}, {"a": state["a"].view(3, 1), "b": state["b"]}),
        fingerprint({"x": 1}, {"a": state["a"].view(torch.int32), "b": state["b"]}),
        fingerprint({"x": 1}, {"c": state["a"], "b": state["b"]}),
    ]
    assert len({base, *others}) == 6
