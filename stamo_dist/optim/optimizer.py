"""AdamW, with its groups of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from stamo_dist.device import Device
from stamo_dist.errors import RecipeError
from stamo_dist.recipe.training import Optimizer
from stamo_dist.shares import shape_of


@dataclass(frozen=True)
class GroupRate:
    """Learning rate of the parameters called `name`: `scale` times the schedule's from the update after `start` on."""

    name: str
    scale: float
    start: int

    def at(self, rate: float, update: int) -> float:
        """From the schedule's rate at a 1-based update."""
        return rate * self.scale if update > self.start else 0.0


def rate_of(parameter: str, cfg: Optimizer) -> GroupRate:
    """Of a parameter by its name: `lr_scale` gives those that begin alike their name and scale."""
    encodes = _encodes(parameter)
    name, scale = ("encoder", cfg.encoder_lr) if encodes else ("", 1.0)
    if fits := [prefix for prefix in cfg.lr_scale if parameter.startswith(prefix)]:
        name = max(fits, key=len)
        scale = cfg.lr_scale[name]
    return GroupRate(name, scale, cfg.encoder_start if encodes else 0)


def own_rates(module: nn.Module, cfg: Optimizer) -> list[GroupRate]:
    """The rates of trained parameters that differ from the schedule's, one of each name."""
    found = {rate_of(name, cfg) for name, p in module.named_parameters() if p.requires_grad}
    return sorted((rate for rate in found if (rate.scale, rate.start) != (1.0, 0)), key=lambda rate: rate.name)


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
        rate = rate_of(name, cfg)
        groups.setdefault((decay, rate.scale, _encodes(name)), []).append(p)
    parameters = [
        {"params": p, "weight_decay": decay, "scale": scale, "start": cfg.encoder_start if encodes else 0}
        for (decay, scale, encodes), p in groups.items()
    ]
    fused = Device.current().is_gpu or None
    return torch.optim.AdamW(parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)


def _encodes(parameter: str) -> bool:
    return parameter.startswith(("encoder.", "compressor."))
