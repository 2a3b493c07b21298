"""FLOPs of one sample, counted by running the models on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one sample's forward pass (one multiply-add is two), by part."""

    encoder: int
    compressor: int
    decoder: int
    vae_encoder: int
    joint_encoder: bool  # whether the encoder is trained

    def trained(self) -> int:
        return self.compressor + self.decoder + (self.encoder if self.joint_encoder else 0)

    def frozen(self, cached_latents: bool = False) -> int:
        return (0 if self.joint_encoder else self.encoder) + (0 if cached_latents else self.vae_encoder)

    def step(self, cached_latents: bool = False) -> int:
        """One training sample: the backward pass costs twice the trained forward."""
        return 3 * self.trained() + self.frozen(cached_latents)


def shapes_only(*modules: nn.Module) -> FakeTensorMode:
    """A context in which only shapes are computed, with the autocast rules and kernels of a CPU.

    `modules`, which are on the meta device, may be called in it; they take no memory.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in modules:
            module.to_empty(device="cpu")
    return mode


def counter() -> FlopCounterMode:
    """PyTorch's FLOP counter, extended by the attention of CPUs."""
    ops: Any = torch.ops.aten
    attention = {
        ops._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        ops._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


def count(module: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of one forward pass of a module with inputs, all on the meta device."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()
