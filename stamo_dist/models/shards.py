"""Loading weights directly into shards: a module on the meta device is sharded, allocated, filled from mapped files.

with on_meta():
    network = ...                  # shapes only
an engine may shard it
materialise(network, device)       # memory for the local shards
write(parameter, stored.read)      # each process reads its slice of the file
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stamo_dist.shares import everyone, share_of

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


def share_out(module: nn.Module, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """For zero3: cut the parameters into shares on `device`, those without memory too; every process calls it.

    Each has memory for the whole only while it is cut. `config`: DeepSpeed's.
    """
    from deepspeed.runtime.zero import Init

    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            cast = dtype if p.is_floating_point() else p.dtype
            plain = torch.empty(
                p.shape, dtype=cast, device=device
            )  # in rows: DeepSpeed takes no other order, as channels-last
            if p.is_meta:
                setattr(part, name, nn.Parameter(plain, requires_grad=p.requires_grad))
            else:
                p.data = plain.copy_(p.data)
            holder = nn.Module()
            holder.register_parameter("shared", getattr(part, name))
            Init(module=holder, config_dict_or_path=config, dtype=dtype)


@torch.no_grad()
def write(tensor: Tensor, read: Callable[[Slices], Tensor]) -> None:
    """Copy into `tensor`, or into this process's shard of it, what `read` gives for its slices of the whole."""
    if hasattr(tensor, "ds_tensor"):
        _write_share(tensor, read)
        return
    if not isinstance(tensor, DTensor):
        tensor.copy_(read((slice(None),) * tensor.ndim))
        return
    local = tensor.to_local()
    if local.numel():
        (chunk,) = tensor.__create_chunk_list__()
        local.copy_(read(tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))))


def _write_share(parameter: Any, read: Callable[[Slices], Tensor]) -> None:
    """Of a parameter of zero3, which has an equal share of the flattened tensor."""
    start, numel = share_of(parameter, everyone()[0])
    if not numel:
        return
    shape = parameter.ds_shape
    width = math.prod(shape[1:])
    first, stop = start // width, -(-(start + numel) // width)
    rows = (slice(first, stop), *(slice(None) for _ in shape[1:])) if shape else ()
    parameter.ds_tensor[:numel].copy_(read(rows).reshape(-1)[start - first * width :][:numel])
