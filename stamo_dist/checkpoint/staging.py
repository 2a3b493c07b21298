"""Copies of the state to save, so that training can continue while they are written."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class Staging:
    """Copies of a state in host memory, which is reused from save to save: allocating takes longer than copying."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """Release the copies of the previous save for reuse."""
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor; from CUDA the copy is complete once the device is synchronised."""
        if self._used == len(self._kept):
            self._kept.append(torch.empty(0))
        kept = self._kept[self._used]
        if (kept.shape, kept.stride(), kept.dtype) != (tensor.shape, tensor.stride(), tensor.dtype):
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._kept[self._used] = kept
        self._used += 1
        return kept.copy_(tensor, non_blocking=True)

    def copy_all(self, value: Any) -> Any:
        """A copy of everything in a nested state."""
        if isinstance(value, Tensor):
            return self.copy(value.detach())
        if isinstance(value, dict):
            held = copy.copy(value)
            for key in held:
                held[key] = self.copy_all(held[key])
            return held
        if type(value) in (list, tuple):
            return type(value)(self.copy_all(v) for v in value)
        return value
