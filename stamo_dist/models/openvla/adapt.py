"""Which parts of a policy train: frozen parts, and low-rank adapters in place of whole weights."""

from __future__ import annotations

from torch import nn

from stamo_dist.errors import RecipeError
from stamo_dist.models.openvla.network import OpenVLA
from stamo_dist.recipe.policy import Freeze, Lora


def freeze(vla: OpenVLA, cfg: Freeze) -> None:
    """Exclude parts from training; call it before adapters are added."""
    parts = {"vision_backbone": cfg.vision, "projector": cfg.projector, "state_projector": cfg.projector,
             "language_model": cfg.language}  # fmt: skip
    for name, frozen in parts.items():
        if frozen and hasattr(vla, name):
            getattr(vla, name).requires_grad_(False)


def add_lora(vla: OpenVLA, cfg: Lora) -> list[str]:
    """Put adapters into the layers that train, whose own weights no longer do; returns the layers' names.

    all-linear is what OpenVLA adapts: every linear layer, the language model's head and the patch embeddings.

    Raises:
        RecipeError: no layer is called that.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [
        name
        for name, layer in vla.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.requires_grad
    ]
    if cfg.targets != "all-linear":
        endings = tuple(cfg.targets)
        layers = [n for n in layers if any(n == e or n.endswith(f".{e}") for e in endings)]
    if not layers:
        raise RecipeError([f"policy.lora.targets: {cfg.targets} matches no layer that trains"])
    config = LoraConfig(
        r=cfg.rank, lora_alpha=cfg.scale, lora_dropout=cfg.dropout, target_modules=layers, init_lora_weights="gaussian"
    )
    inject_adapter_in_model(config, vla)
    return layers


def merge_lora(vla: OpenVLA) -> None:
    """Add the adapters to the weights they adapt and take them out: the names are the checkpoints' again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: m for name, m in vla.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in adapted.items():
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(vla.get_submodule(parent), leaf, layer.get_base_layer())
