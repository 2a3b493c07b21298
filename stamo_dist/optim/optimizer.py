"""AdamW, with its groups of parameters."""

from __future__ import annotations

import torch
from torch import nn

from stamo_dist.device import Device
from stamo_dist.errors import RecipeError
from stamo_dist.recipe.training import Optimizer
from stamo_dist.shares import shape_of


def adamw(module: nn.Module, cfg: Optimizer) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (biases, norms) and learned queries get no weight decay.

    A group's `scale` multiplies the schedule from step `start` on: the encoder's and the compressor's parameters take
    `encoder_lr` and `encoder_start`, those that `lr_scale` names its numbers.

    Raises:
        RecipeError: `lr_scale` matches no trained parameter.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if idle := [prefix for prefix in cfg.lr_scale if not any(name.startswith(prefix) for name in named)]:
        begin = ", ".join(sorted({".".join(name.split(".")[:2]) for name in named}))
        why = f"no trained parameter's name begins so; they begin with {begin}"
        raise RecipeError([f"optimizer.lr_scale.{prefix}: {why}" for prefix in idle])
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, p in named.items():
        decay = cfg.weight_decay if len(shape_of(p)) >= 2 and not name.endswith("queries") else 0.0
        encodes = name.startswith(("encoder.", "compressor."))
        scale = cfg.encoder_lr if encodes else 1.0
        if fits := [prefix for prefix in cfg.lr_scale if name.startswith(prefix)]:
            scale = cfg.lr_scale[max(fits, key=len)]
        groups.setdefault((decay, scale, encodes), []).append(p)
    parameters = [
        {"params": p, "weight_decay": decay, "scale": scale, "start": cfg.encoder_start if encodes else 0}
        for (decay, scale, encodes), p in groups.items()
    ]
    fused = Device.current().is_gpu or None
    return torch.optim.AdamW(parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)
