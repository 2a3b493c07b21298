from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from stamo_dist.models import flow
from stamo_dist.recipe.schema import Flow


def test_sigma_has_the_density_that_diffusers_trains_sd3_with() -> None:
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    ours = flow.sigma(uniform, Flow(mean=-0.5, std=1.3))
    torch.manual_seed(0)
    theirs = compute_density_for_timestep_sampling("logit_normal", 200_000, logit_mean=-0.5, logit_std=1.3)
    levels = torch.linspace(0.01, 0.99, 25)
    torch.testing.assert_close(ours.quantile(levels), theirs.quantile(levels), atol=0.01, rtol=0)
    torch.testing.assert_close(flow.sigma(uniform, Flow(sigma="uniform")), uniform)
    assert flow.sigma(torch.tensor([0.0, 1.0]), Flow()).isfinite().all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noising_and_shift_are_the_schedulers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    uniform = torch.tensor([1.0, 0.7, 0.25, 0.001])
    sigma = flow.sigma(uniform, Flow(sigma="uniform", shift=shift))
    index = 1000 - (uniform * 1000).round().long()
    torch.testing.assert_close(sigma, scheduler.sigmas[index])
    torch.testing.assert_close(sigma * flow.TIMESTEPS, scheduler.timesteps[index])
    z0, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    torch.testing.assert_close(
        flow.interpolate(z0, noise, sigma), scheduler.scale_noise(z0, scheduler.timesteps[index], noise)
    )


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sampler_follows_a_straight_flow_to_the_data(steps: int) -> None:
    z0, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    seen = []

    def velocity(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma[0].item())
        torch.testing.assert_close(z, flow.interpolate(z0, noise, sigma))
        return noise - z0

    torch.testing.assert_close(flow.sample(velocity, noise, steps, shift=3.0), z0)
    unshifted = torch.linspace(1, 1 / steps, steps)
    assert seen == pytest.approx(flow.shift_sigma(unshifted, 3.0).tolist())
