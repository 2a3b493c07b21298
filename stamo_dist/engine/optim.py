"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from stamo_dist.recipe.schema import Optimizer


def adamw(module: nn.Module, cfg: Optimizer) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (biases, norms) and learned queries are not decayed."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (decayed if p.ndim >= 2 and not name.endswith("queries") else rest).append(p)
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, cfg.weight_decay), (rest, 0.0))
        if params
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=torch.cuda.is_available() or None)


def lr_at(step: int, steps: int, cfg: Optimizer) -> float:
    """Learning rate of the 1-based optimizer step: linear warm-up, then cosine to `final_lr` or constant."""
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    progress = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.lr * (cfg.final_lr + (1 - cfg.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
