"""How an exported model lies on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ExportLayout:
    """How an exported model lies on disk.

    `form` applies to policies: openvla is the released checkpoints' layout, which the official code reads; with hf the
    language model is in its own folder that plain transformers opens; peft is adapters without their base. `dtype`:
    of the trained weights, fp32 when omitted; frozen weights keep theirs. `shard_size`: maximum size of a file, such
    as 5GB. `alone`: frozen encoders, which a run's own export names by their source, are written too.
    """

    form: Literal["openvla", "hf", "peft"] = "openvla"
    dtype: torch.dtype | None = None
    shard_size: str = "5GB"
    alone: bool = False


WHOLE = ExportLayout()
