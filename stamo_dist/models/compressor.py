"""Patch features → state: learnable queries in a small transformer.

The queries are prepended to the projected patch tokens and all tokens attend to all, as in TiTok (Yu et al. 2024,
arXiv 2406.07550); the outputs at the queries' positions are the state. DINOv2's patch tokens already carry their
position (its position embeddings are added before the first block), so none is added here.

A LayerNorm without affine parameters ends the compressor, unless `norm` is false: every state token has mean 0 and
norm √dim. So the decoder sees one scale throughout training, states cannot drift to make the loss small, and a motion
(the difference of two states) is never longer than 2·√dim. Normalising onto a sphere is nonlinear, though, which
matters for small states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stamo_dist.models import weights
from stamo_dist.models.recompute import run_block
from stamo_dist.recipe import schema

#: Fraction of the mean variance: directions of smaller variance are not scaled up fully by whitening, or the
#: states would be unstable under small changes of the weights.
_LEAST_VARIANCE = 1e-4


class CompressorLayer(nn.Module):
    """Pre-norm attention and MLP, as in ViT."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, keep: int) -> Tensor:
        """(B, N, width) → the first `keep` tokens (B, keep, width), which have attended to all N."""
        h = self.norm1(x)
        q = self.q(h[:, :keep]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(h).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x[:, :keep] + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class Compressor(nn.Module):
    """(B, N, features) patch tokens → (B, tokens, dim) state."""

    state_mean: Tensor
    state_std: Tensor
    state_map: Tensor | None

    def __init__(self, cfg: schema.CompressorConfig, features: int):
        super().__init__()
        self.cfg = cfg
        self.tokens, self.dim, self.features = cfg.tokens, cfg.dim, features
        self.recompute = 0  # one layer of so many; 0: none
        self.queries = nn.Parameter(torch.empty(cfg.tokens, cfg.width))
        self.input = nn.Linear(features, cfg.width)
        self.layers = nn.ModuleList(CompressorLayer(cfg.width, cfg.heads) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width)
        self.output = nn.Linear(cfg.width, cfg.dim)
        self.register_buffer("state_mean", torch.zeros(cfg.tokens, cfg.dim))
        self.register_buffer("state_std", torch.ones(cfg.tokens, cfg.dim))
        # Registered only where it is used, so that other compressors keep their files.
        whiten = torch.eye(cfg.dim).expand(cfg.tokens, -1, -1).clone() if cfg.whiten else None
        self.register_buffer("state_map", whiten)
        self.state_norm = nn.LayerNorm(cfg.dim, elementwise_affine=False) if cfg.norm else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def settings(self) -> dict[str, Any]:
        """The configuration fields that affect the states, besides the weights."""
        # Noise and the straight map are for training only; a whitening map is among the weights.
        return self.cfg.model_dump(exclude={"noise", "whiten", "straighten"})

    def fingerprint(self, seen: Callable[[Tensor], Tensor] = Tensor.detach) -> str:
        """SHA-256 of the weights (each mapped by `seen`) and of the settings."""
        return weights.fingerprint(self.settings(), self.state_dict(), seen)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, features) of any float dtype → (B, tokens, dim)."""
        patches = self.input(features.to(self.input.weight.dtype))
        x = torch.cat([self.queries.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1)
        for i, layer in enumerate(self.layers):
            keep = x.shape[1] if i < len(self.layers) - 1 else self.tokens
            x = run_block(layer, i, self.recompute, x, keep)
        states = (self.output(self.norm(x)) - self.state_mean) / self.state_std
        if self.state_map is not None:
            states = torch.einsum("btd,tde->bte", states, self.state_map.to(states.dtype))
        return self.state_norm(states)

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Set the mean and deviation applied before the last norm to those of these frames.

        With random weights, states of frames of one scene differ by only a few percent: without this, the decoder
        treats the difference as noise, and training removes it. With several scenes, which differ far more from each
        other than frames of one, differences within a scene are only visible in decorrelated (whitened) states.
        """
        self.state_mean.zero_()
        self.state_std.fill_(1)
        if self.state_map is not None:
            self.state_map.copy_(torch.eye(self.dim, device=self.state_map.device).expand_as(self.state_map))
        outputs: list[Tensor] = []
        handle = self.output.register_forward_hook(lambda module, inputs, output: outputs.append(output.float()))
        for part in features.split(32):
            self(part)
        handle.remove()
        states = torch.cat(outputs)
        self.state_mean.copy_(states.mean(0))
        self.state_std.copy_(states.std(0).clamp_min(1e-6))
        if self.state_map is not None:
            standard = ((states - self.state_mean) / self.state_std).to(torch.float64)
            values, directions = torch.linalg.eigh(torch.einsum("ntd,nte->tde", standard, standard) / len(standard))
            scale = values.clamp_min(_LEAST_VARIANCE).rsqrt()
            self.state_map.copy_(directions * scale[:, None, :])
