"""SD3's attention with one product for queries, keys and values in place of three.

The weights stay the three matrices of released checkpoints and are joined when they are used. What it saves is in the
backward pass: the input's gradient is one product, not three and two sums over activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointAttention:
    """Attention processor of diffusers' SD3 blocks; takes the place of JointAttnProcessor2_0."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image tokens (B, N, dim) and the context's (B, M, dim), if any → both, attended to together."""
        query, key, value = _projected(hidden_states, (attn.to_q, attn.to_k, attn.to_v), attn.heads)
        query, key = _normed(query, attn.norm_q), _normed(key, attn.norm_k)
        if encoder_hidden_states is not None:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            of_context = _projected(encoder_hidden_states, layers, attn.heads)
            query = torch.cat([query, _normed(of_context[0], attn.norm_added_q)], dim=2)
            key = torch.cat([key, _normed(of_context[1], attn.norm_added_k)], dim=2)
            value = torch.cat([value, of_context[2]], dim=2)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).to(query.dtype)
        if encoder_hidden_states is None:
            return attn.to_out[0](out)
        image, context = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), context if attn.context_pre_only else attn.to_add_out(context)


def _projected(x: Tensor, layers: Sequence[nn.Linear], heads: int) -> tuple[Tensor, ...]:
    """x (B, N, dim) → queries, keys and values, each (B, heads, N, dim / heads)."""
    if hasattr(layers[0].weight, "ds_id"):  # zero3 gathers a layer's weights when the layer is called
        parts = [layer(x) for layer in layers]
    else:
        weight = torch.cat(tuple(layer.weight for layer in layers))
        biases = tuple(layer.bias for layer in layers if layer.bias is not None)
        parts = list(F.linear(x, weight, torch.cat(biases) if biases else None).chunk(3, dim=-1))
    return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x)
