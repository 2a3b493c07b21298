"""Parts of tensors in PyTorch's distributed checkpoints, and reading them without a process group."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


@dataclass(frozen=True)
class Piece:
    """The part of a flattened tensor of `size` elements that this process saves: `tensor`, from element `start` on."""

    tensor: Tensor
    start: int
    size: int

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        at = torch.Size([self.start])
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=at, sizes=self.tensor.size()),
            properties=TensorProperties.create_from_tensor(self.tensor),
            size=torch.Size([self.size]),
        )
        return [WriteItem(index=MetadataIndex(name, at), type=WriteItemType.SHARD, tensor_data=data)]


def offset_of(shard: Any) -> int:
    """Offset in the flattened tensor of the local part of a DTensor sharded along its first dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(shard.shape, shard.device_mesh, shard.placements)
    return int(offset[0]) * math.prod(shard.shape[1:])


def tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """All tensors of a distributed checkpoint: key → global size and dtype."""
    entries: Mapping[str, Any] = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: m for name, m in entries.items() if isinstance(m, TensorStorageMetadata)}


def read_dcp(folder: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors under `prefix.` of a distributed checkpoint, whole, on the CPU."""
    state = {
        name: torch.empty(m.size, dtype=m.properties.dtype)
        for name, m in tensors(folder).items()
        if name.startswith(prefix + ".")
    }
    _load(state, folder, DefaultLoadPlanner())
    return {name[len(prefix) + 1 :]: t for name, t in state.items()}


def read_rows(folder: Path, rows: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Rows [first, stop) of each named tensor, on the CPU; (0, 1) of a scalar is the scalar.

    Raises:
        KeyError: The checkpoint holds no tensor of that name.
    """
    stored = tensors(folder)
    state, offsets = {}, {}
    for name, (first, stop) in rows.items():
        size = stored[name].size
        state[name] = torch.empty((stop - first, *size[1:]) if size else (), dtype=stored[name].properties.dtype)
        offsets[name] = torch.Size((first, *(0 for _ in size[1:])) if size else ())
    _load(state, folder, _RowPlanner(offsets))
    return state


def read_ranges(folder: Path, ranges: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Of each named tensor, flattened, `numel` elements from `start` on, flat, on the CPU; ranges: (start, numel).

    Raises:
        KeyError: The checkpoint holds no tensor of that name.
    """
    stored = tensors(folder)
    widths = {name: math.prod(stored[name].size[1:]) for name in ranges}
    wanted = {n: (at // widths[n], -(-(at + numel) // widths[n])) for n, (at, numel) in ranges.items() if numel}
    rows = read_rows(folder, wanted)
    return {n: t.view(-1).narrow(0, ranges[n][0] - wanted[n][0] * widths[n], ranges[n][1]) for n, t in rows.items()}


class _RowPlanner(DefaultLoadPlanner):
    """Reads parts of the stored tensors, starting at `offsets`."""

    def __init__(self, offsets: Mapping[str, torch.Size]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._offsets = offsets

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "set_up_planner comes first"
        items = []
        for name, tensor in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata), "only names of tensors are asked for"
            wanted = ChunkStorageMetadata(offsets=self._offsets[name], sizes=tensor.size())
            items += create_read_items_for_chunk_list(name, stored, [wanted])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        tensor: Tensor = self.state_dict[index.fqn]
        return tensor


def _load(state: dict[str, Tensor], folder: Path, planner: DefaultLoadPlanner) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder, planner=planner, no_dist=True)
