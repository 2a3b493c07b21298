"""Small OpenVLA folders and the official implementation's outputs, for the tests beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import stamo_dist.models  # noqa: F401 (must precede transformers)
from stamo_dist.models.openvla.text import Encoded, TextTokenizer

HERE = Path(__file__).resolve().parent / "goldens"
ROOT = HERE.parent.parent.parent
INSTRUCTIONS = ["pick up the cup", "open the drawer and put the red block in it", "Fold the towel"]
SPACE = 29871


def goldens(name: str) -> Path:
    """A file or folder of the goldens."""
    return HERE / name


class Golden:
    """One case: its folder, inputs, expected tensors and what expected.json says."""

    def __init__(self, name: str):
        self.folder = goldens(name)
        self.inputs = load_file(self.folder / "inputs.safetensors")
        self.expected = load_file(self.folder / "expected.safetensors")
        self.about: dict[str, Any] = json.loads((self.folder / "expected.json").read_text())
        self.towers: list[dict[str, Any]] = self.about["timm_kwargs"]

    def prompt(self, case: str, blanks: int = 0) -> Encoded:
        """The ids of one predict case, as ours are encoded."""
        ids = self.inputs[f"{case}.input_ids"][0].tolist()
        ids += [] if ids[-1] == SPACE else [SPACE]
        row = torch.tensor([[*ids, *([1] * blanks + [2] if blanks else [])]])
        return Encoded(
            row, torch.ones_like(row, dtype=torch.bool), torch.full_like(row, -100), torch.tensor([len(ids)])
        )


def close(found: Any, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=tolerance, rtol=tolerance, check_dtype=False)


def text_tokenizer() -> TextTokenizer:
    """A demo tokenizer of 512 ids."""
    return TextTokenizer.from_instructions(INSTRUCTIONS, size=512)


#: A network of two small towers for the demo tokenizer's vocabulary.
TINY: dict[str, Any] = {
    "image_sizes": [28, 28],
    "pad_token_id": 512,
    "timm_kwargs": [
        {"embed_dim": 16, "depth": 3, "num_heads": 2},
        {"embed_dim": 8, "depth": 2, "num_heads": 2},
    ],
    "text_config": {
        "model_type": "llama", "vocab_size": 576, "pad_token_id": 512, "hidden_size": 16, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    },
    "torch_dtype": "float32",
}  # fmt: skip
