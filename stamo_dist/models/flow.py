"""Flow matching as in Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206), in diffusers' conventions.

z_σ = (1−σ)·z₀ + σ·ε, velocity ε − z₀, σ = 0 is data and σ = 1 is noise. Random numbers always come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stamo_dist.recipe.schema import Flow

TIMESTEPS = 1000  # SD3's transformer takes σ·1000


def shift_sigma(level: Tensor, shift: float) -> Tensor:
    """SD3's resolution shift σ' = s·σ / (1 + (s−1)·σ) (eq. 23 of the paper)."""
    return shift * level / (1 + (shift - 1) * level)


def sigma(uniform: Tensor, flow: Flow) -> Tensor:
    """Noise levels of one training batch: (B,) uniform numbers in (0, 1) → (B,) float32 σ in [0, 1].

    logit_normal: σ = sigmoid(mean + std·Φ⁻¹(u)) (section 3.1 of the paper); the shift is applied to either density.
    """
    u = uniform.to(torch.float64)
    level = u if flow.sigma == "uniform" else torch.sigmoid(flow.mean + flow.std * torch.special.ndtri(u))
    return shift_sigma(level, flow.shift).to(torch.float32)


def interpolate(z0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z_σ = (1−σ)·z₀ + σ·ε for latents (B, C, h, w) and σ (B,)."""
    level = sigma.view(-1, 1, 1, 1)
    return (1 - level) * z0 + level * noise


def sample(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, shift: float) -> Tensor:
    """Integrate from noise to data with diffusers' Euler sampler.

    `velocity(z_σ, σ)` takes latents (B, C, h, w) and σ (B,), both float32. The levels are 1, 1−1/n, …, 1/n, shifted,
    then 0: every step removes noise, so a single step already gives a full prediction. Returns z₀ (B, C, h, w).
    """
    # Imported here: it imports scipy.stats, which training does not need.
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    scheduler.set_begin_index(0)
    z = noise.to(torch.float32)
    for timestep, level in zip(scheduler.timesteps, scheduler.sigmas[:-1].tolist(), strict=True):
        step = velocity(z, torch.full((len(z),), level, dtype=torch.float32, device=z.device))
        z = scheduler.step(step.to(torch.float32), timestep, z).prev_sample
    return z
