"""Writing a policy as a folder that we and the official OpenVLA and OFT code read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stamo_dist.export_layout import WHOLE, ExportLayout
from stamo_dist.models import weights
from stamo_dist.models.openvla import adapters
from stamo_dist.models.openvla.actions import SETTINGS, STATISTICS, Statistics
from stamo_dist.models.openvla.adapters import Base
from stamo_dist.models.openvla.framing import AS_IT_IS, Framing
from stamo_dist.models.openvla.images import PREPROCESSOR, ImageProcessor
from stamo_dist.models.openvla.load import HEADS, LANGUAGE
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.openvla.policy_network import PolicyNetwork
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.models.policy_base import folder_settings

_STEP = "latest"  # replaces the step in official file names
_FILM_RANK = 32  # of the adapters that OFT's loader puts on before it reads FiLM's file
_FILM = re.compile(r"featurizer\.blocks\.\d+\.(scale|shift)\.")
_HUB = "openvla/openvla-7b--"  # location of the official code for transformers' trust_remote_code
_CODE: dict[str, dict[str, Any]] = {
    "config": {
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {
            "AutoConfig": f"{_HUB}configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": f"{_HUB}modeling_prismatic.OpenVLAForActionPrediction",
        },
    },
    "image_processor": {
        "auto_map": {
            "AutoImageProcessor": f"{_HUB}processing_prismatic.PrismaticImageProcessor",
            "AutoProcessor": f"{_HUB}processing_prismatic.PrismaticProcessor",
        },
        "processor_class": "PrismaticProcessor",
    },
    "processor": {
        "auto_map": {"AutoProcessor": f"{_HUB}processing_prismatic.PrismaticProcessor"},
        "processor_class": "PrismaticProcessor",
    },
}


@dataclasses.dataclass(frozen=True)
class PolicyParts:
    """A policy's folder without weights; `network` gives the weights' names; `tokenizer_fingerprint`: StaMo's."""

    network: PolicyNetwork
    text: TextTokenizer
    processor: ImageProcessor
    statistics: Statistics
    framing: Framing = AS_IT_IS
    tokenizer_fingerprint: str | None = None


def save_pretrained(policy: Policy, folder: str | Path, *, shard_size: str = "5GB") -> None:
    """Write a policy; adapters must be merged (`adapt.merge_lora`). `policy.json` is written last."""
    fingerprint = policy.vision.tokenizer.fingerprint if policy.vision else None
    parts = PolicyParts(policy.network, policy.text, policy.processor, policy.statistics, policy.framing, fingerprint)
    save_parts(Path(folder), parts, policy.network.state_dict(), ExportLayout(shard_size=shard_size))


def save_parts(
    folder: Path,
    policy: PolicyParts,
    state: Mapping[str, Tensor],
    layout: ExportLayout = WHOLE,
    *,
    base: Base | None = None,
) -> None:
    """As `save_pretrained`, with the weights `state` by the network's names; the network's own weights are not read.

    All weights are safetensors: the towers, the projector and the language model in shards under the released names,
    each further part in a file of its own. In the form openvla, action head, proprioception and FiLM are the `.pt`
    files that OFT's code opens. In the form hf the language model is in a separate folder that plain transformers
    opens. With `base`, PEFT's adapter files replace the towers, the projector and the language model.

    Raises:
        ValueError: there are unmerged adapters without `base`, or none with a `base`.
    """
    network = policy.network
    adapted = next((name for name in state if ".lora_" in name), None)
    if base is None and adapted:
        raise ValueError(f"{adapted} is an adapter: merge them before saving")
    if base is not None and not adapted:
        raise ValueError("there are no adapters to save for a base")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).unlink(missing_ok=True)
    about: dict[str, Any] = {}
    if base is not None:
        parameters = network.named_parameters()
        kept = {name: p.dtype for name, p in parameters if not p.requires_grad and _plain(name) not in base.lacks}
        state = {name: tensor for name, tensor in state.items() if name not in kept}
        about["base_dtype"] = _dtype_name(next(d for n, d in kept.items() if ".base_layer." in n))
    state = {name: weights.cast(tensor, layout.dtype) for name, tensor in state.items()}
    parts = {name: _below(state, f"{name}.") for name in ("vla", *HEADS)}
    dtype = _dtype_name(next(iter(parts["vla"].values())).dtype)
    _write_vla(folder, policy, parts["vla"], dtype, layout, base)
    official = layout.form == "openvla"
    _write_heads(folder, parts, official=official)
    if network.vla.film and base is None:
        _write_film(folder, network, parts["vla"], official=official)
    _write_configs(folder, policy, dtype, official=layout.form != "hf" and bool(network.vla.config.towers))
    fingerprint = policy.tokenizer_fingerprint
    settings = folder_settings(network.cfg, network.sizes, policy.statistics, policy.framing, fingerprint)
    _write(folder / SETTINGS, {**settings, **about})


def _write_vla(
    folder: Path, policy: PolicyParts, state: Mapping[str, Tensor], dtype: str, layout: ExportLayout, base: Base | None
) -> None:
    """Write towers, projector and language model, or with a `base` their adapters; `dtype`: torch's name for config."""
    network = policy.network
    vla = _without_film(state)
    if layout.form == "hf":
        language = _below(vla, "language_model.")
        vla = {key: tensor for key, tensor in vla.items() if not key.startswith("language_model.")}
        weights.save_shards(language, folder / LANGUAGE, shard_size=layout.shard_size)
        model = {**network.vla.config.text.to_dict(), "architectures": ["LlamaForCausalLM"], "torch_dtype": dtype}
        _write(folder / LANGUAGE / "config.json", model)
        policy.text.save(folder / LANGUAGE)
    if base is not None:
        assert network.cfg.lora is not None, "the adapters were made from policy.lora"
        adapters.save(folder, network.cfg.lora, state, base.name, _released)
    else:
        weights.save_shards(vla, folder, shard_size=layout.shard_size)


def _write_heads(folder: Path, parts: Mapping[str, Mapping[str, Tensor]], *, official: bool) -> None:
    for head in HEADS:
        if parts[head] and official and head != "world_head":  # which OFT's code does not know
            torch.save({f"module.{k}": v for k, v in parts[head].items()}, folder / f"{head}--{_STEP}_checkpoint.pt")
        elif parts[head]:
            weights.save(parts[head], folder / f"{head}.safetensors")


def _write_film(folder: Path, network: PolicyNetwork, vla: Mapping[str, Tensor], *, official: bool) -> None:
    if official:
        towers = _as_adapted(network.vla.vision_backbone, _below(vla, "vision_backbone."))
        torch.save(towers, folder / f"vision_backbone--{_STEP}_checkpoint.pt")
        return
    weights.save({k: t for k, t in vla.items() if _FILM.search(k)}, folder / "vision_backbone.safetensors")


def _write_configs(folder: Path, policy: PolicyParts, dtype: str, *, official: bool) -> None:
    """Write config.json, statistics, preprocessor and text tokenizer; `official`: with the released code's entries."""
    statistics, raw = policy.statistics, policy.network.vla.config.raw
    config = {key: value for key, value in raw.items() if key != "auto_map"}
    _write(
        folder / "config.json",
        {
            **config,
            **(_CODE["config"] if official else {}),
            "torch_dtype": dtype,
            "text_config": {**raw["text_config"], "torch_dtype": dtype},
            "norm_stats": statistics.sources,
        },
    )
    _write(folder / STATISTICS, statistics.sources)
    if policy.processor.views:
        _write(folder / PREPROCESSOR, {**policy.processor.to_dict(), **(_CODE["image_processor"] if official else {})})
    policy.text.save(folder)
    if official:
        _write(folder / "processor_config.json", _CODE["processor"])
        path = folder / "tokenizer_config.json"
        _write(path, {**json.loads(path.read_text(encoding="utf-8")), **_CODE["processor"]})


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _without_film(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_released(k): v for k, v in state.items() if not _FILM.search(k)}


def _released(name: str) -> str:
    """A parameter's name without FiLM."""
    return re.sub(r"(\.blocks\.\d+\.)block\.", r"\1", name)


def _as_adapted(towers: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FiLM's file in OFT's form, which has adapters; here they are zero."""
    out = {}
    adapted = {
        name: layer
        for name, layer in towers.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and not re.search(r"\.(scale|shift)$", name)
    }
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer not in adapted:
            out[f"vision_backbone.{name}"] = tensor
            continue
        out[f"vision_backbone.{layer}.base_layer.{leaf}"] = tensor
        if leaf == "weight":
            ones = (1,) * (tensor.ndim - 2)
            down, up = (_FILM_RANK, *tensor.shape[1:]), (tensor.shape[0], _FILM_RANK, *ones)
            out[f"vision_backbone.{layer}.lora_A.default.weight"] = tensor.new_zeros(down)
            out[f"vision_backbone.{layer}.lora_B.default.weight"] = tensor.new_zeros(up)
    return out
