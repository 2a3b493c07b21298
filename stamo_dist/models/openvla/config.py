"""Reading `config.json` of an OpenVLA checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import LlamaConfig

from stamo_dist.errors import CheckpointError, RecipeError
from stamo_dist.pretrained.reading import read_config

DINOV2 = "vit_large_patch14_reg4_dinov2.lvd142m"
SIGLIP = "vit_so400m_patch14_siglip_224"
_TOWERS: dict[str, tuple[list[str], int]] = {
    "dinosiglip-vit-so-224px": ([DINOV2, SIGLIP], 224),
    "dinosiglip-vit-so-384px": ([DINOV2, "vit_so400m_patch14_siglip_384"], 384),
    "siglip-vit-so400m": ([SIGLIP], 224),
    "siglip-vit-so400m-384px": (["vit_so400m_patch14_siglip_384"], 384),
    "dinov2-vit-l": ([DINOV2], 224),
}
_LLAMA_2 = {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064}

#: openvla-7b's file without statistics. `text_config` has only values that differ from LlamaConfig's defaults.
OPENVLA_7B: dict[str, Any] = {
    "arch_specifier": "no-align+fused-gelu-mlp",
    "architectures": ["OpenVLAForActionPrediction"],
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "llm_backbone_id": "llama2-7b-pure",
    "llm_max_length": 2048,
    "model_type": "openvla",
    "n_action_bins": 256,
    "norm_stats": {},
    "output_projector_states": False,
    "pad_to_multiple_of": 64,
    "pad_token_id": 32000,
    "text_config": _LLAMA_2,
    "timm_model_ids": [DINOV2, SIGLIP],
    "timm_override_act_layers": [None, None],
    "torch_dtype": "bfloat16",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}


@dataclass(frozen=True)
class Tower:
    """One vision tower: a timm model and its arguments for `timm.create_model`."""

    model: str
    image_size: int
    act_layer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenVLAConfig:
    """The fields of `config.json` that determine the network, and the whole file for export.

    `towers` is empty if image features come from outside (`vision: stamo`).
    """

    raw: dict[str, Any]
    towers: tuple[Tower, ...]
    text: LlamaConfig

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], source: str, tower_options: Sequence[Mapping[str, Any]] = ()
    ) -> OpenVLAConfig:
        """Read the fields; `tower_options` are added to `timm_kwargs`, our own field for towers of another size.

        Raises:
            CheckpointError: a language model other than Llama, unknown towers or lists of different lengths.
        """
        full = copy.deepcopy(dict(raw))
        text = full.get("text_config") or {}
        if text.get("model_type", "llama") != "llama":
            raise CheckpointError(
                f"{source}: text_config.model_type is {text['model_type']}; only Llama language models are supported"
            )
        full["timm_kwargs"] = [dict(o) for o in tower_options] or full.get("timm_kwargs")
        towers = _towers(full, source)
        full["use_fused_vision_backbone"] = len(towers) > 1
        if full["timm_kwargs"] is None:
            del full["timm_kwargs"]
        text = {k: v for k, v in text.items() if k not in ("torch_dtype", "dtype")}
        try:
            return cls(full, towers, LlamaConfig(**text))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: text_config does not describe a Llama model ({error})") from error

    @classmethod
    def from_folder(cls, folder: Path, source: str, tower_options: Sequence[Mapping[str, Any]] = ()) -> OpenVLAConfig:
        """Read `config.json` of a checkpoint folder; `source` is the recipe field that an error names."""
        return cls.from_dict(read_config(folder, "policy", source), f"{source}: {folder}", tower_options)

    def with_vision(self, vision: Literal["fused", "dinov2", "stamo"]) -> OpenVLAConfig:
        """A config with the same language model and another vision: `dinov2` keeps the first tower, `stamo` none.

        Raises:
            RecipeError: dinov2 is requested of a checkpoint without it.
        """
        if vision == "fused":
            return self
        if vision == "dinov2" and not (self.towers and "dinov2" in self.towers[0].model):
            raise RecipeError(["policy.vision: dinov2 needs a checkpoint that has that tower; openvla-7b has it"])
        count = 1 if vision == "dinov2" else 0
        lists = {k: self.raw[k][:count] for k in _LISTS if k in self.raw}
        name = "dinov2-vit-l" if vision == "dinov2" else "stamo"
        return OpenVLAConfig.from_dict({**self.raw, **lists, "vision_backbone_id": name}, "policy.vision")

    @property
    def hidden(self) -> int:
        """Width H of the language model."""
        return self.text.hidden_size

    @property
    def text_vocabulary(self) -> int:
        """Ids of the text tokenizer: the vocabulary without its padding; the last `bins` of them are the actions."""
        return self.text.vocab_size - int(self.raw.get("pad_to_multiple_of", 64))

    @property
    def bins(self) -> int:
        return int(self.raw.get("n_action_bins", 256))

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        return int(self.raw.get("pad_token_id", 32000))

    @property
    def resize(self) -> str:
        return str(self.raw.get("image_resize_strategy", "resize-naive"))


_LISTS = ("timm_model_ids", "image_sizes", "timm_override_act_layers", "timm_kwargs")  # one entry per tower


def _towers(raw: dict[str, Any], source: str) -> tuple[Tower, ...]:
    known, size = _TOWERS.get(raw.get("vision_backbone_id", ""), (None, 224))
    ids = raw.get("timm_model_ids", known)
    if ids is None:
        raise CheckpointError(
            f"{source}: vision_backbone_id {raw.get('vision_backbone_id')!r} is not known and timm_model_ids is "
            f"missing; known are {', '.join(_TOWERS)}"
        )
    columns = {
        "image_sizes": raw.get("image_sizes", [size] * len(ids)),
        "timm_override_act_layers": raw.get("timm_override_act_layers", [None] * len(ids)),
        "timm_kwargs": raw["timm_kwargs"] or [{}] * len(ids),
    }
    if uneven := [name for name, column in columns.items() if len(column) != len(ids)]:
        raise CheckpointError(
            f"{source}: {', '.join(uneven)} must have {len(ids)} entries, one for each timm_model_ids"
        )
    if len(ids) > 2:
        raise CheckpointError(f"{source}: timm_model_ids names {len(ids)} towers; one or two are supported")
    return tuple(Tower(*row) for row in zip(ids, *columns.values(), strict=True))
