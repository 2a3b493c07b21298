"""Gradient checkpointing: which blocks keep no activations, and compute them again in the backward pass.

`every` is 0 for none of them, 1 for all, k for the first of each k.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, number: int, every: int, *inputs: Any) -> Any:
    """What the block of this number, from 0 on, makes of its inputs."""
    if every and number % every == 0 and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def recompute_transformers(model: Any, blocks: Iterable[Any], every: int) -> None:
    """Have a model of transformers recompute some of its `blocks`."""
    if not every:
        model.gradient_checkpointing_disable()
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for number, block in enumerate(blocks):
        block.gradient_checkpointing = number % every == 0


def recompute_diffusers(model: Any, blocks: Iterable[Any], every: int) -> None:
    """Have a model of diffusers recompute some of its `blocks`."""
    if not every:
        model.disable_gradient_checkpointing()
        return
    numbers = {block: number for number, block in enumerate(blocks)}
    model.enable_gradient_checkpointing(lambda block, *inputs: run_block(block, numbers[block], every, *inputs))
