"""Heads beside OpenVLA: OFT's action head and proprioception projector, and the world head (next state)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Residual(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class _ResidualMLP(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, blocks: int = 2):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(inputs)
        self.fc1 = nn.Linear(inputs, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(_Residual(hidden) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class ActionHead(nn.Module):
    """OFT's regression head: the hidden states of a time step's A placeholders → its A numbers."""

    def __init__(self, hidden: int, action_dim: int):
        super().__init__()
        self.action_dim = action_dim
        self.model = _ResidualMLP(hidden * action_dim, hidden, action_dim)

    def forward(self, states: Tensor) -> Tensor:
        """(B, C·A, H) → normalised actions (B, C, A), not clipped."""
        steps = states.unflatten(1, (-1, self.action_dim)).flatten(2)
        return self.model(steps.to(self.model.fc1.weight.dtype))


class ProprioProjector(nn.Module):
    """Normalised proprioception (B, P) → one token (B, 1, H)."""

    def __init__(self, proprio_dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, proprio: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(proprio.to(self.fc1.weight.dtype))))[:, None]


class WorldHead(nn.Module):
    """One hidden state → the next state, its motion, or the patch features of the next frame.

    One small MLP is shared by all target tokens, each with its own embedding, so the MLP's size does not depend on the
    number of tokens (two state tokens or 256 patches).
    """

    def __init__(self, hidden: int, tokens: int, dim: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.input = nn.Linear(hidden, width)
        self.tokens = nn.Parameter(torch.empty(tokens, width))
        self.middle = nn.Linear(width, width)
        self.output = nn.Linear(width, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.tokens, std=1.0)

    def forward(self, state: Tensor) -> Tensor:
        """(B, H) → (B, tokens, dim)."""
        x = self.input(self.norm(state.to(self.input.weight.dtype)))
        x = F.gelu(x[:, None] + self.tokens)
        return self.output(F.gelu(self.middle(x)))
