"""Llama's attention for sequences of which none is packed with another."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

#: What `attn_implementation` names.
UNPACKED = "sdpa_unpacked"


def _mask(batch_size: int, cache_position: Tensor, kv_length: int, **options: Any) -> Tensor | None:
    """As for "sdpa", but None where nothing is padding and nothing is cached.

    Transformers would make one there, for sequences that may be packed; with any mask no flash attention runs.
    """
    if options.get("attention_mask") is None and kv_length == len(cache_position):
        return None
    return sdpa_mask(batch_size=batch_size, cache_position=cache_position, kv_length=kv_length, **options)


AttentionInterface.register(UNPACKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNPACKED, _mask)
