"""Choosing the trained parts of a policy: frozen parts, low-rank adapters, and fully trained weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

import torch
from torch import nn

from stamo_dist.errors import RecipeError
from stamo_dist.models.openvla.network import OpenVLA
from stamo_dist.models.openvla.policy_network import PolicyNetwork
from stamo_dist.recipe.policy import Freeze, Lora, PolicyConfig

_FILM = re.compile(r"\.blocks\.\d+\.(scale|shift)\.")


def prepare(
    network: PolicyNetwork, cfg: PolicyConfig, whole: Collection[str] = (), base: torch.dtype = torch.float32
) -> list[str]:
    """Freeze parts and insert adapters as `cfg` says; returns the layers with adapters.

    `whole` names parameters that are trained fully regardless of `cfg`, because they are not in the checkpoint and
    start at random. With adapters, frozen weights are kept in the dtype `base`. Heads are always trained fully.

    Raises:
        RecipeError: no layer that may have adapters matches the names in `cfg.lora`.
    """
    trains = {name for name, p in network.named_parameters() if p.requires_grad}  # parameters that a loss reaches
    _freeze(network.vla, cfg.freeze)
    layers = [] if cfg.lora is None else _add_lora(network.vla, cfg.lora, whole)
    for name, p in network.named_parameters():
        if name in trains and name.replace(".base_layer.", ".") in whole:
            p.requires_grad_(True)
        elif layers and not p.requires_grad:
            p.data = p.data.to(base)
    return layers


def _freeze(vla: OpenVLA, cfg: Freeze) -> None:
    parts = {
        "vision_backbone": cfg.vision,
        "projector": cfg.projector,
        "state_projector": cfg.projector,
        "language_model": cfg.language,
    }
    for name, frozen in parts.items():
        if frozen and hasattr(vla, name):
            getattr(vla, name).requires_grad_(False)


def _add_lora(vla: OpenVLA, cfg: Lora, whole: Collection[str]) -> list[str]:
    """Insert adapters into trained layers not in `whole`; the rest of `vla` is then frozen.

    all-linear means OpenVLA's choice: every linear layer, the language model's head and the patch embeddings.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [
        name
        for name, layer in vla.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.requires_grad and f"vla.{name}.weight" not in whole
    ]
    if cfg.targets != "all-linear":
        endings = tuple(cfg.targets)
        layers = [n for n in layers if any(n == e or n.endswith(f".{e}") for e in endings)]
    if not layers:
        raise RecipeError([f"policy.lora.targets: {cfg.targets} matches no layer that has weights to adapt and trains"])
    config = LoraConfig(
        r=cfg.rank, lora_alpha=cfg.scale, lora_dropout=cfg.dropout, target_modules=layers, init_lora_weights="gaussian"
    )
    inject_adapter_in_model(config, vla)
    return layers


def merge_lora(vla: OpenVLA) -> None:
    """Merge the adapters into their weights and remove them, which restores the checkpoints' names.

    The sum is rounded to the number format of the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: m for name, m in vla.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in adapted.items():
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(vla.get_submodule(parent), leaf, layer.get_base_layer())


def listing(network: PolicyNetwork) -> list[str]:
    """Lines that list the fully trained, adapted, and frozen parts with their numbers of parameters.

    Every parameter is in one of the three; the adapters' own parameters are counted separately.
    """
    found: dict[str, Counter[str]] = {kind: Counter() for kind in ("whole", "adapted", "frozen", "adapters")}
    for name, p in network.named_parameters():
        if ".lora_" in name:
            kind = "adapters"
        elif p.requires_grad:
            kind = "whole"
        else:
            kind = "adapted" if ".base_layer." in name else "frozen"
        found[kind][_part(name)] += p.numel()
    adapters = found.pop("adapters")
    lines = []
    for kind, parts in found.items():
        sizes = [
            f"{part} {size:,}" + (f" by {adapters[part]:,}" if kind == "adapted" else "")
            for part, size in parts.items()
        ]
        by = f" by {adapters.total():,} of adapters" if kind == "adapted" else ""
        lines += [f"{kind}: {parts.total():,} parameters{by} ({', '.join(sizes)})"] if parts else []
    return lines


def _part(name: str) -> str:
    if _FILM.search(name):
        return "FiLM"
    words = name.split(".")
    return ".".join(words[: 2 if words[0] == "vla" else 1])
