"""Copies of the state to save, so that training can continue while they are written."""

from __future__ import annotations

import torch
from torch import Tensor

from stamo_dist.device import Device


class Staging:
    """Copies of a state in host memory, which is reused from save to save: allocating takes longer than copying."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._kept: list[Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """Release the copies of the previous save for reuse."""
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy, which is there after `wait`."""
        if self._used == len(self._kept):
            self._kept.append(torch.empty(0))
        kept = self._kept[self._used]
        if (kept.shape, kept.stride(), kept.dtype) != (tensor.shape, tensor.stride(), tensor.dtype):
            kept = self._device.host_like(tensor)
            self._kept[self._used] = kept
        self._used += 1
        return kept.copy_(tensor, non_blocking=True)

    def wait(self) -> None:
        """Until all copies are there."""
        self._device.synchronize()
