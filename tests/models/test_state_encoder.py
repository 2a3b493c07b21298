"""Half of a tokenizer: the same states and the same identity, without reading the other half."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stamo_dist.errors import CheckpointError
from stamo_dist.models import weights
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.models.tokenizer import Tokenizer

Build = Callable[..., Tokenizer]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each state dict that is hashed."""
    found: list[int] = []
    whole = weights.fingerprint

    def fingerprint(config: Mapping[str, Any], state: Mapping[str, Tensor], *more: Any) -> str:
        found.append(sum(t.numel() * t.element_size() for t in state.values()))
        return whole(config, state, *more)

    monkeypatch.setattr(weights, "fingerprint", fingerprint)
    return found


def same_states(half: StateEncoder, whole: Tokenizer, frames: Tensor) -> bool:
    """Of the same weights to the bit; a CPU's matrix products may round by where in memory their operands lie."""
    parts = ((half.encoder, whole.encoder), (half.compressor, whole.trained.compressor))
    pairs = [(mine.state_dict(), its.state_dict()) for mine, its in parts]
    same = all(mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine) for mine, its in pairs)
    return same and torch.allclose(half.encode(frames), whole.encode(frames), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as it is", "bf16"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen encoder", "joint encoder"])
def test_states_and_identity_without_the_decoder(
    tokenizer: Build, frames: Tensor, tmp_path: Path, hashed: list[int], frozen: bool, dtype: torch.dtype | None
) -> None:
    model = tokenizer(frozen).eval()
    with torch.no_grad():
        for p in model.trained.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(tmp_path, dtype=dtype)
    whole = Tokenizer.from_pretrained(tmp_path)
    fingerprint = whole.fingerprint()
    for part in ("transformer", "vae"):
        shutil.rmtree(tmp_path / part)

    hashed.clear()
    half = StateEncoder.from_pretrained(tmp_path)
    assert half.fingerprint == fingerprint
    assert same_states(half, whole, frames)
    assert sum(hashed) == sum(t.numel() * t.element_size() for t in half.state_dict().values())
    assert sum(p.numel() for p in half.parameters()) < sum(p.numel() for p in whole.parameters())
    assert not any(p.requires_grad for p in half.parameters())


def test_other_weights_than_the_recorded_ones_are_refused(tokenizer: Build, official: Path, tmp_path: Path) -> None:
    tokenizer(False).save_pretrained(tmp_path / "joint")
    for part, name in (("encoder", "layernorm.bias"), ("compressor", "state_mean")):
        folder = shutil.copytree(tmp_path / "joint", tmp_path / part)
        file = folder / part / "model.safetensors"
        tensors = load_file(file)
        tensors[name].flatten()[0] += 1e-3
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"the {part} is not the one this tokenizer was trained with"):
            StateEncoder.from_pretrained(folder)

    path = tmp_path / "joint" / "stamo.json"
    about = json.loads(path.read_text())
    about["model"]["compressor"]["heads"] *= 2
    path.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="the compressor is not the one"):
        StateEncoder.from_pretrained(tmp_path / "joint")

    tokenizer().save_pretrained(tmp_path / "frozen")
    moved = shutil.copytree(official / "dino", tmp_path / "dino")
    assert StateEncoder.from_pretrained(tmp_path / "frozen", encoder_weights=str(moved))
    tensors = load_file(moved / "model.safetensors")
    tensors["layernorm.bias"][0] += 1e-3
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the encoder is not the one"):
        StateEncoder.from_pretrained(tmp_path / "frozen", encoder_weights=str(moved))


def test_an_export_that_records_nothing_is_read_whole(tokenizer: Build, frames: Tensor, tmp_path: Path) -> None:
    model = tokenizer().eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "stamo.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({key: about[key] for key in about if key not in ("fingerprint", "sees")}))
    half = StateEncoder.from_pretrained(tmp_path)
    assert half.fingerprint == model.fingerprint() == about["fingerprint"]
    assert same_states(half, model, frames)
    assert {name.partition(".")[0] for name, _ in half.named_parameters()} == {"encoder", "compressor"}
