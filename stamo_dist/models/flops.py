"""Arithmetic of one sample, counted by running the models' shapes on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one sample's forward pass (one multiply-add is two), by part."""

    encoder: int
    compressor: int
    decoder: int
    vae_encoder: int
    joint_encoder: bool  # the encoder is trained

    def trained(self) -> int:
        return self.compressor + self.decoder + (self.encoder if self.joint_encoder else 0)

    def frozen(self, cached_latents: bool = False) -> int:
        return (0 if self.joint_encoder else self.encoder) + (0 if cached_latents else self.vae_encoder)

    def step(self, cached_latents: bool = False) -> int:
        """One training sample: the backward pass costs twice the trained forward."""
        return 3 * self.trained() + self.frozen(cached_latents)


def count(module: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of one forward pass of a module and inputs that live on the meta device."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()
