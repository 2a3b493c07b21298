"""PyTorch's distributed checkpoint format, written through sinks, with the layout kept from save to save."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from stamo_dist.checkpoint.manifest import Stored
from stamo_dist.checkpoint.sink import Sink, without_crc
from stamo_dist.checkpoint.staging import Staging
from stamo_dist.distributed.collectives import everywhere, gather, scatter
from stamo_dist.distributed.dcp import Piece

_INDEX = ".metadata"


class Layout:
    """Which rank writes which part of a state, and its position in the files.

    It usually stays the same from save to save; then ranks exchange only one number. Every process keeps one.
    """

    def __init__(self) -> None:
        self.assigned: SavePlan | None = None  # what this process writes
        self._local: SavePlan | None = None  # what it could write
        self._metadata: Metadata | None = None  # rank 0, until the index is made
        self._index: bytes | None = None  # rank 0
        self._written: list[WriteResult] | None = None  # positions of this process's part at the last save

    def agree(self, planner: dcp.DefaultSavePlanner) -> SavePlan:
        """Agree on this process's part of the state that `planner` was set up with; every process calls it."""
        local = planner.create_local_plan()
        if not everywhere(local == self._local):
            plans = gather(local)
            assigned = None if plans is None else self.assign(planner, plans)
            self.assigned, self._local, self._written = scatter(assigned), local, None
        assert self.assigned is not None, "the first local plan differs from none"
        return self.assigned

    def assign(self, planner: dcp.DefaultSavePlanner, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0: the part that each rank writes, given the parts that each could write."""
        assigned, self._metadata = planner.create_global_plan(plans)
        self._index = None
        return dcp.FileSystemWriter("").prepare_global_plan(assigned)

    def news(self, written: list[WriteResult]) -> list[WriteResult] | None:
        """The positions that rank 0 must learn; None if they equal those of the last save."""
        same, self._written = written == self._written, written
        return None if same else written

    def index(self, news: list[list[WriteResult] | None]) -> bytes:
        """Rank 0: the content of the index, given every rank's `news`."""
        changed = {result.index: result.storage_data for some in news for result in some or ()}
        if changed or self._index is None:
            metadata = self._metadata or pickle.loads(self._index or b"")
            metadata.version = CURRENT_DCP_VERSION
            metadata.storage_data = {**(metadata.storage_data or {}), **changed}
            self._index, self._metadata = pickle.dumps(metadata), None
        return self._index


class DcpWriter:
    """A state in PyTorch's distributed checkpoint format, under `name`/; `layout`: that of the previous save."""

    def __init__(self, name: str, state: dict[str, Any], staging: Staging | None, layout: Layout | None = None):
        self._name, self._planner, self._layout = name, _Planner(), layout or Layout()
        self._staged = staging is not None
        self._planner.set_up_planner(state, is_coordinator=not dist.is_initialized() or dist.get_rank() == 0)
        self._plan = self._planner.finish_plan(self._layout.agree(self._planner))
        if staging:
            self._planner.hold(self._plan, staging)

    def write(self, folder: Path, files: dict[str, Stored]) -> list[WriteResult] | None:
        (folder / self._name).mkdir(parents=True, exist_ok=True)
        # Overlapped copying from the device uses its streams, so only if the state is on the device.
        ahead = 0 if self._staged else 10_000_000
        writer = dcp.FileSystemWriter(folder / self._name, sync_files=False, per_thread_copy_ahead=ahead)
        writer.fs = _Files(folder, files)
        with without_crc():
            return self._layout.news(writer.write_data(self._plan, self._planner).wait())

    def finish(self, folder: Path, files: dict[str, Stored], written: list[Any]) -> None:
        sink = Sink(folder / self._name / _INDEX)
        sink.write(self._layout.index(written))
        files[f"{self._name}/{_INDEX}"] = sink.finish()


class _Planner(dcp.DefaultSavePlanner):
    """PyTorch's planner, extended to copy this process's part into host memory."""

    _held: dict[MetadataIndex, Any] | None = None

    def hold(self, plan: SavePlan, staging: Staging) -> None:
        held: dict[MetadataIndex, Any] = {}
        for item in plan.items:
            data = super().resolve_data(item)
            held[item.index] = data if isinstance(data, io.BytesIO) else staging.copy(data.detach())
        self._held = held
        self.state_dict = {}
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.tensor if isinstance(found, Piece) else super().lookup_object(index)

    def resolve_data(self, write_item: WriteItem) -> Any:
        return super().resolve_data(write_item) if self._held is None else self._held[write_item.index]


class _Files(FileSystem):
    """Writes through `Sink` and records every file by its path below `root`."""

    def __init__(self, root: Path, files: dict[str, Stored]):
        self._root, self._record = root, files

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        sink = Sink(Path(path))
        yield sink
        self._record[str(Path(path).relative_to(self._root))] = sink.finish()
