"""DINOv2's tensors by the names of released weights, whatever the installed transformers calls them.

Since transformers 5 its classes name the attention's and the gated MLP's layers otherwise, and hold the latter's first
matrix as two. Files and fingerprints keep the released names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version

import torch
from packaging.version import Version
from torch import Tensor

from stamo_dist.models.shards import Slices, StoredTensor

_RENAMES = Version(version("transformers")) >= Version("5")
_CLASS = {  # released name → the name in transformers 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.weights_out": "mlp.down_proj",
}
_RELEASED = {new: old for old, new in _CLASS.items()}
_IN, _GATE, _UP = "mlp.weights_in", "mlp.gate_proj", "mlp.up_proj"
_KEY = re.compile(r"(?P<block>encoder\.layer\.\d+\.)(?P<layer>.+)\.(?P<kind>weight|bias)")


def of_the_class(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint's tensors by the names of the installed class."""
    if not _RENAMES:
        return dict(stored)
    found: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        if match is None:
            found[key] = tensor
        elif match["layer"] == _IN:
            half = tensor.shape[0] // 2
            for number, layer in enumerate((_GATE, _UP)):
                found[_named(match, layer)] = _rows(tensor, number * half, half)
        else:
            found[_named(match, _CLASS.get(match["layer"], match["layer"]))] = tensor
    return found


def released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state dict by the released names."""
    if not _RENAMES:
        return dict(state)
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            found[key] = tensor
        elif match["layer"] == _GATE:
            found[_named(match, _IN)] = torch.cat([tensor, state[_named(match, _UP)]])
        elif match["layer"] != _UP:
            found[_named(match, _RELEASED.get(match["layer"], match["layer"]))] = tensor
    return found


def _named(match: re.Match[str], layer: str) -> str:
    return f"{match['block']}{layer}.{match['kind']}"


def _rows(tensor: StoredTensor, start: int, count: int) -> StoredTensor:
    def read(slices: Slices) -> Tensor:
        rows = tensor.read((slice(start, start + count), *slices[1:]))
        return rows[slices[:1]]

    return StoredTensor((count, *tensor.shape[1:]), read)
