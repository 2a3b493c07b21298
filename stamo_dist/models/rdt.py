"""A small diffusion-transformer policy similar to RDT (Liu et al. 2024, arXiv 2410.07864), of diffusers' layers.

Action chunk and pseudo-actions (one motion of the StaMo tokenizer over the chunk, or one a step) are denoised
together, each number predicted clean. A video without actions trains only the pseudo-actions: its action tokens are
masked in attention and in the loss. Blocks cross-attend to the image and the instruction alternately, as in RDT.
Random numbers always come from the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor, nn

from stamo_dist.models.recompute import run_block
from stamo_dist.recipe.policy import DiffusionTransformerConfig

_SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
_HIDDEN = -10_000.0  # added to the attention scores of masked tokens


@dataclass(frozen=True)
class DiffusionSizes:
    """Dimensions given by the data and the encoder."""

    chunk: int  # C
    action_dim: int  # A
    image_dim: int  # of one image token
    vocabulary: int  # ids of the text tokenizer
    motion: tuple[int, int] | None = None  # of the pseudo-actions: tokens, of the motion or one a step, and dim
    proprio_dim: int = 0


def motion_shape(pseudo: str, per: str, horizon: int, state: tuple[int, int]) -> tuple[int, int] | None:
    """`DiffusionSizes.motion` for states of (tokens, dim)."""
    tokens, dim = state
    if pseudo == "none":
        return None
    if pseudo == "pixels":
        side = pixel_grid(tokens, dim)
        return side, 3 * side
    return (horizon, tokens * dim) if per == "step" else state


def pixel_grid(tokens: int, dim: int) -> int:
    """Side of the square grid of pooled pixels with about as many numbers as a state."""
    return max(1, round((tokens * dim / 3) ** 0.5))


class Condition(NamedTuple):
    """The conditioning of a timestep."""

    image: Tensor  # (B, N, image_dim)
    text: Tensor  # (B, L) ids
    text_mask: Tensor  # (B, L) bool
    proprio: Tensor | None = None  # (B, P) normalised


class ActionPlan(NamedTuple):
    """The denoised variables, noisy or clean."""

    actions: Tensor  # (B, C, A) normalised
    motion: Tensor | None = None  # (B, tokens, dim)


class DiffusionTransformer(nn.Module):
    """Noisy plan, noise level and condition → clean plan."""

    def __init__(self, cfg: DiffusionTransformerConfig, sizes: DiffusionSizes):
        super().__init__()
        self.cfg, self.sizes = cfg, sizes
        self.recompute = 0  # one block of so many; 0: none
        width = cfg.width
        tokens = 1 + (sizes.proprio_dim > 0) + sizes.chunk + (sizes.motion[0] if sizes.motion else 0)
        self.time = nn.Sequential(Timesteps(width, True, 0), TimestepEmbedding(width, width))
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.proprio_in = nn.Linear(sizes.proprio_dim, width) if sizes.proprio_dim else None
        self.action_in, self.action_out = _mlp(sizes.action_dim, width), nn.Linear(width, sizes.action_dim)
        if sizes.motion:
            self.motion_in, self.motion_out = _mlp(sizes.motion[1], width), nn.Linear(width, sizes.motion[1])
        self.image_in = nn.Sequential(nn.LayerNorm(sizes.image_dim), _mlp(sizes.image_dim, width))
        self.text_in = nn.Embedding(sizes.vocabulary, width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                cfg.heads,
                width // cfg.heads,
                cross_attention_dim=width,
                activation_fn="gelu-approximate",
                attention_bias=True,
            )
            for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        noisy: ActionPlan,
        timestep: Tensor,
        known: Condition,
        has_actions: Tensor | None = None,
        has_motion: Tensor | None = None,
    ) -> ActionPlan:
        """The clean plan, float32. `timestep` (B,) counts noise levels; bool masks, (B,), or for the pseudo-action also
        (B, its tokens), mask what a sample lacks.
        """
        dtype, batch = self.action_out.weight.dtype, len(noisy.actions)
        time = self.time[1](self.time[0](timestep).to(dtype))
        parts = [time[:, None]]
        if self.proprio_in is not None:
            assert known.proprio is not None, "the policy reads proprioception and the batch has none"
            parts.append(self.proprio_in(known.proprio.to(dtype))[:, None])
        start = sum(part.shape[1] for part in parts)
        end = start + self.sizes.chunk
        parts.append(self.action_in(noisy.actions.to(dtype)))
        if noisy.motion is not None:
            parts.append(self.motion_in(noisy.motion.to(dtype)))
        x = torch.cat(parts, dim=1)
        x = x + self.positions[: x.shape[1]]
        hidden = None
        if has_actions is not None or has_motion is not None:
            seen = torch.ones(batch, x.shape[1], dtype=torch.bool, device=x.device)
            if has_actions is not None:
                seen[:, start:end] = has_actions[:, None]
            if has_motion is not None:
                seen[:, end:] = has_motion.view(batch, -1)
            hidden = _bias(seen, dtype)
        image, text = self.image_in(known.image.to(dtype)), self.text_in(known.text)
        for i, block in enumerate(self.blocks):
            context, padding = (image, None) if i % 2 == 0 else (text, _bias(known.text_mask, dtype))
            x = run_block(block, i, self.recompute, x, hidden, context, padding)
        x = self.norm(x)
        motion = None if noisy.motion is None else self.motion_out(x[:, end:]).float()
        return ActionPlan(self.action_out(x[:, start:end]).float(), motion)

    def set_gradient_checkpointing(self, every: int) -> None:
        """Recompute the activations of one block of each `every` in the backward pass; 0: of none."""
        self.recompute = every

    def block_classes(self) -> tuple[str, ...]:
        """Class names of the transformer blocks that FSDP shards one by one."""
        return (BasicTransformerBlock.__name__,)


def add_noise(
    cfg: DiffusionTransformerConfig, clean: ActionPlan, noise: ActionPlan, uniform: Tensor
) -> tuple[ActionPlan, Tensor]:
    """The plan at random noise levels, from (B,) uniform numbers in [0, 1) → noisy plan, (B,) int64 levels."""
    scheduler = DDPMScheduler(cfg.timesteps, **_SCHEDULE)
    timestep = (uniform * cfg.timesteps).long().clamp_max(cfg.timesteps - 1)
    motion = None
    if clean.motion is not None and noise.motion is not None:
        motion = scheduler.add_noise(clean.motion, noise.motion, timestep)
    return ActionPlan(scheduler.add_noise(clean.actions, noise.actions, timestep), motion), timestep


@torch.no_grad()
def draw(model: DiffusionTransformer, known: Condition, noise: ActionPlan) -> ActionPlan:
    """Denoise from `noise` (standard normal) with DPM-Solver++; the same noise gives the same plan."""
    levels = [DPMSolverMultistepScheduler(model.cfg.timesteps, **_SCHEDULE) for _ in noise]
    for scheduler in levels:
        scheduler.set_timesteps(model.cfg.sampler_steps)
    plan = noise
    for timestep in levels[0].timesteps:
        clean = model(plan, timestep.to(noise.actions.device).expand(len(noise.actions)), known)
        motion = None
        if plan.motion is not None:
            motion = levels[1].step(clean.motion, timestep, plan.motion).prev_sample
        plan = ActionPlan(levels[0].step(clean.actions, timestep, plan.actions).prev_sample, motion)
    return plan


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) bool → additive attention bias (B, 1, T)."""
    return ((~seen).to(dtype) * _HIDDEN)[:, None]
