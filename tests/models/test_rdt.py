"""The diffusion-transformer policy: what a video without actions may and may not change, and that it learns."""

from __future__ import annotations

import pytest
import torch
from vla_cases import close

from stamo_dist.models.rdt import ActionPlan, Condition, DiffusionSizes, DiffusionTransformer, add_noise, draw
from stamo_dist.recipe.policy import DiffusionTransformerConfig

CFG = DiffusionTransformerConfig(width=32, depth=4, heads=4, timesteps=100, sampler_steps=5)
SIZES = DiffusionSizes(chunk=4, action_dim=3, image_dim=12, vocabulary=20, motion=(2, 8), proprio_dim=2)


def moments(count: int) -> Condition:
    text = torch.arange(count * 5).view(count, 5) % 20
    mask = torch.ones(count, 5, dtype=torch.bool)
    mask[:, 4] = False
    return Condition(torch.randn(count, 6, 12), text, mask, torch.randn(count, 2))


@pytest.fixture
def model() -> DiffusionTransformer:
    torch.manual_seed(0)
    return DiffusionTransformer(CFG, SIZES)


def test_what_a_video_lacks_is_not_seen(model: DiffusionTransformer) -> None:
    known, plan = moments(2), ActionPlan(torch.randn(2, 4, 3), torch.randn(2, 2, 8))
    has, time = torch.tensor([True, False]), torch.tensor([10, 90])
    before = model(plan, time, known, has)
    after = model(plan._replace(actions=plan.actions + 1), time, known, has)
    assert not torch.allclose(before.motion[0], after.motion[0])
    close(after.motion[1], before.motion[1], 1e-6)
    # Nor is the padding of the text.
    text = known.text.clone()
    text[:, 4] = 7
    close(model(plan, time, known._replace(text=text), has).actions, before.actions, 1e-6)
    # Each of the others is.
    changes = {"image": known.image + 1, "text": known.text.flip(0), "proprio": known.proprio + 1}  # type: ignore[operator]
    for name, value in changes.items():
        other = known._replace(**{name: value})
        assert not torch.allclose(model(plan, time, other, has).actions, before.actions)


def test_a_step_behind_the_episodes_end_is_not_seen(model: DiffusionTransformer) -> None:
    known, plan = moments(2), ActionPlan(torch.randn(2, 4, 3), torch.randn(2, 2, 8))
    has, steps, time = torch.ones(2).bool(), torch.tensor([[True, True], [True, False]]), torch.tensor([10, 90])
    before = model(plan, time, known, has, steps)
    other = plan.motion.clone()  # type: ignore[union-attr]
    other[:, 1] += 1
    after = model(plan._replace(motion=other), time, known, has, steps)
    assert not torch.allclose(before.actions[0], after.actions[0])
    close(after.actions[1], before.actions[1], 1e-6)
    close(after.motion[1, 0], before.motion[1, 0], 1e-6)
    whole = model(plan, time, known, has, torch.ones(2).bool())  # (B,) says it of all tokens
    assert torch.equal(whole.actions[0], before.actions[0])


def test_noise_runs_from_nearly_none_to_nearly_all() -> None:
    clean, noise = (
        ActionPlan(torch.ones(3, 4, 3), torch.ones(3, 2, 8)),
        ActionPlan(torch.zeros(3, 4, 3), torch.zeros(3, 2, 8)),
    )
    noisy, timestep = add_noise(CFG, clean, noise, torch.tensor([0.0, 0.5, 0.9999]))
    assert timestep.tolist() == [0, 50, 99]
    levels = noisy.actions[:, 0, 0]
    assert levels[0] > 0.99 > levels[1] > 0.5 > levels[2]
    assert torch.equal(noisy.motion[:, 0, 0], levels)  # type: ignore[index]


def test_it_learns_chunks_and_draws_them(model: DiffusionTransformer) -> None:
    known = moments(6)
    clean = ActionPlan(torch.rand(6, 4, 3) * 2 - 1, torch.randn(6, 2, 8))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(250):
        model.set_gradient_checkpointing(step % 3)
        noise = ActionPlan(torch.randn(6, 4, 3), torch.randn(6, 2, 8))
        noisy, timestep = add_noise(CFG, clean, noise, torch.rand(6))
        found = model(noisy, timestep, known)
        loss = (found.actions - clean.actions).square().mean() + (found.motion - clean.motion).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    start = ActionPlan(torch.randn(6, 4, 3), torch.randn(6, 2, 8))
    drawn = draw(model.eval(), known, start)
    assert torch.equal(drawn.actions, draw(model, known, start).actions)
    assert (drawn.actions - clean.actions).abs().mean() < 0.15
    assert (drawn.motion - clean.motion).abs().mean() < 0.25  # type: ignore[operator]
