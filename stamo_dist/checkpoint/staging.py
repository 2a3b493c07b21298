"""Copies of what is saved, so that training can go on while they are written."""

from __future__ import annotations

import torch
from torch import Tensor

from stamo_dist.device import Device


class Staging:
    """Copies of a state in host memory. The memory is kept from save to save: getting it takes longer than copying."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._kept: list[Tensor] = []
        self._used = 0

    def begin(self) -> None:
        """Give up the copies of the save before."""
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
