"""Copies of what is saved, so that training can go on while they are written."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """Copies of a state in host memory. The memory is kept from save to save: getting it takes longer than copying."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """Give up the copies of the save before."""
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """On CUDA the copy is there once the device is synchronised."""
        if self._used == len(self._kept):
            self._kept.append(torch.empty(0))
        kept = self._kept[self._used]
        if (kept.shape, kept.stride(), kept.dtype) != (tensor.shape, tensor.stride(), tensor.dtype):
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._kept[self._used] = kept
        self._used += 1
        return kept.copy_(tensor, non_blocking=True)
