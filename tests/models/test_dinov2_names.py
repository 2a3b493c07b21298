"""DINOv2's tensors by the names of transformers 5 and back; with transformers 5 the other tests read and write so."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DINO

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from transformers import Dinov2Config, Dinov2Model

from stamo_dist.models import dinov2_names
from stamo_dist.models.shards import StoredTensor

BLOCK = "encoder.layer.0."
# What transformers 5.24's Dinov2Model has in a block where release 4 has other names.
OF_5 = {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"}
GATED_OF_5 = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize("gated", [False, True])
def test_there_and_back(monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    state = dinov2_names.released(Dinov2Model(Dinov2Config(**DINO, use_swiglu_ffn=gated)).state_dict())
    monkeypatch.setattr(dinov2_names, "_RENAMES", True)
    stored = {key: StoredTensor.in_memory(tensor) for key, tensor in state.items()}
    tensors = {key: tensor.whole() for key, tensor in dinov2_names.of_the_class(stored).items()}
    layers = {key.removeprefix(BLOCK).rpartition(".")[0] for key in tensors if key.startswith(BLOCK)}
    assert layers >= OF_5 | (GATED_OF_5 if gated else set())
    assert not {name for name in layers if "attention.attention" in name or "weights_" in name}

    again = dinov2_names.released(tensors)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_a_part_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2_names, "_RENAMES", True)
    whole = torch.arange(24.0).view(8, 3)
    halves = dinov2_names.of_the_class({f"{BLOCK}mlp.weights_in.weight": StoredTensor.in_memory(whole)})
    up = halves[f"{BLOCK}mlp.up_proj.weight"]
    assert up.shape == (4, 3)
    assert torch.equal(up.read((slice(1, 3), slice(0, 2))), whole[5:7, :2])
