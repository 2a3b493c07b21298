"""Loading weights directly into shards: a module on the meta device is sharded, allocated, filled from mapped files.

with on_meta():
    network = ...                  # shapes only
an engine may shard it
materialise(network, device)       # memory for the local shards
write(parameter, stored.read)      # each process reads its slice of the file
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, read lazily."""

    shape: tuple[int, ...]
    read: Callable[[Slices], Tensor]

    @classmethod
    def in_file(cls, file: Any, key: str) -> StoredTensor:
        """A tensor of an open safetensors file."""
        shape = tuple(file.get_slice(key).get_shape())
        # safetensors cannot slice a scalar.
        return cls(shape, lambda slices: file.get_slice(key)[slices] if shape else file.get_tensor(key))

    def whole(self) -> Tensor:
        return self.read((slice(None),) * len(self.shape))

    def rounded(self, dtype: torch.dtype) -> StoredTensor:
        """The same tensor rounded to `dtype`."""
        return StoredTensor(self.shape, lambda slices: self.read(slices).to(dtype))

    @classmethod
    def in_memory(cls, tensor: Tensor) -> StoredTensor:
        return cls(tuple(tensor.shape), lambda slices: tensor[slices])


def on_meta() -> AbstractContextManager[None]:
    """Modules built inside have parameters on the meta device, but real buffers."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def materialise(module: nn.Module, device: torch.device | str = "cpu") -> None:
    """Allocate parameters on the meta device (or this process's shards of them); the others keep their values.

    Allocated parameters are new objects.
    """
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


@torch.no_grad()
def write(tensor: Tensor, read: Callable[[Slices], Tensor]) -> None:
    """Fill `tensor`, or this process's shard of it, from `read`, which is called with slices of the whole tensor."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(read((slice(None),) * tensor.ndim))
        return
    local = tensor.to_local()
    if local.numel():
        (chunk,) = tensor.__create_chunk_list__()
        local.copy_(read(tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))))
