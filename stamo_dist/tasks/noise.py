"""Random numbers that depend only on (seed, step, sample).

They do not depend on rank, world size, worker count or restarts. The generator is
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) in vectorised torch, so it needs no
state and gives the same words on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    `counter`: four broadcastable int64 tensors holding 32-bit words. Returns four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # 32×32 → 64-bit products; int64 wraps, its bits are those of the unsigned product.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Noise:
    """The noise of one run; `at(step)` gives that of one optimizer step."""

    seed: int

    def at(self, step: int) -> StepNoise:
        return StepNoise(self.seed, step)


@dataclass(frozen=True)
class StepNoise:
    """Noise of one step. `stream` separates independent draws for the same sample."""

    seed: int
    step: int

    def _words(self, samples: Tensor, count: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        block = torch.arange(count, device=samples.device, dtype=torch.int64)[None, :] | (stream << 28)
        sample = samples.to(torch.int64)[:, None]
        step = torch.full_like(sample, self.step)
        counter = (block, step, sample & _MASK, (sample >> 32) & _MASK)
        return philox(counter, (self.seed & _MASK, (self.seed >> 32) & _MASK))

    def uniform(self, samples: Tensor, stream: int = 0) -> Tensor:
        """One number in the open interval (0, 1) for each sample id: (B,) int64 → (B,) float32."""
        word = self._words(samples, 1, stream)[0][:, 0]
        return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23  # 24 bits: exact in fp32

    def normal(self, samples: Tensor, shape: Sequence[int], stream: int = 1) -> Tensor:
        """Standard normal noise for each sample id: (B,) int64 → (B, *shape) float32, by Box–Muller."""
        size = math.prod(shape)
        a, b, c, d = self._words(samples, (size + 3) // 4, stream)
        radius = torch.stack([a, c], -1).to(torch.float32).add_(1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = torch.stack([b, d], -1).to(torch.float32).mul_(2.0 * math.pi * 2.0**-32)
        out = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
        return out.reshape(len(samples), -1)[:, :size].reshape(len(samples), *shape)
