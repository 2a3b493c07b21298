"""Llama's attention for sequences of which none is packed with another."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

#: What `attn_implementation` names.
UNPACKED = "sdpa_unpacked"


def _mask(*, kv_length: int, **options: Any) -> Tensor | None:
    """As for "sdpa", but None where nothing is padding and nothing is cached.

    Transformers would make one there, for sequences that may be packed; with any mask no flash attention runs.
    """
    # Transformers 4 gives the queries' positions, 5 their number.
    queries = options["q_length"] if "q_length" in options else len(options["cache_position"])
    if options.get("attention_mask") is None and kv_length == queries:
        return None
    return sdpa_mask(kv_length=kv_length, **options)


AttentionInterface.register(UNPACKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNPACKED, _mask)
