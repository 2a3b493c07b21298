"""Reading PyTorch's distributed checkpoints without a process group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def read_dcp(folder: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors under `prefix.` of a distributed checkpoint, whole, on the CPU."""
    entries: Mapping[str, Any] = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(m.size, dtype=m.properties.dtype)
        for name, m in entries.items()
        if name.startswith(prefix + ".") and isinstance(m, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {name[len(prefix) + 1 :]: t for name, t in state.items()}
