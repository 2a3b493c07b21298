"""Bytes of a served policy's weights on the device, and of weights not loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from stamo_dist.errors import RecipeError
from stamo_dist.plan.shapes import policy_tokenizer, shapes
from stamo_dist.recipe.schema import Recipe


@dataclass(frozen=True)
class Part:
    name: str
    numel: int
    size: int  # bytes of its parameters and buffers
    held: bool  # whether it is on the device while serving


def serving(recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[list[Part], list[str]]:
    """The parts of a policy exported in `dtype` with merged adapters, and the assumptions made.

    Raises:
        RecipeError: It is not a policy, or the size of a checkpoint is unknown.
    """
    if recipe.stage != "policy":
        raise RecipeError([f"stage: {recipe.stage}, but only a policy is served; give a policy's recipe"])
    made = shapes(recipe)
    dtype = torch.float32 if recipe.policy.diffusion is not None else dtype  # loaded in float32
    parts = [_part("policy", [made.trained], dtype)]
    if recipe.policy.vision == "stamo":
        tokenizer = policy_tokenizer(recipe, [])
        assert tokenizer is not None, "the recipe's check wants a tokenizer"
        parts.append(
            _part("tokenizer: encoder, compressor", [tokenizer.encoder, tokenizer.trained.compressor], torch.float32)
        )
        parts.append(
            _part("tokenizer: decoder, VAE", [tokenizer.trained.decoder, tokenizer.vae], torch.float32, held=False)
        )
    return parts, made.notes


def _part(name: str, modules: list[nn.Module], dtype: torch.dtype, *, held: bool = True) -> Part:
    parameters = [p for m in modules for n, p in m.named_parameters() if ".lora_" not in n]
    tensors = [*parameters, *(b for m in modules for b in m.buffers())]
    size = sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize) for t in tensors)
    return Part(name, sum(p.numel() for p in parameters), size, held)
