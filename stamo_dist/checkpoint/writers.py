"""What one process writes into a checkpoint, in three acts.

*Plan* needs all processes and happens in the training thread; *write* is this process's own files, needs nobody and
may run beside the next steps; *finish* is rank 0's index over what all wrote. So a full disk on one process never
leaves the others waiting in a collective.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from stamo_dist.checkpoint.manifest import Stored
from stamo_dist.distributed.engine import Engine

ZERO_TAG = "zero"


class CheckpointWriter(Protocol):
    """One group of files of a checkpoint."""

    def write(self, folder: Path, files: dict[str, Stored]) -> Any:
        """Write and sync this process's files under `folder` and record them; returns what `finish` needs.

        Raises:
            OSError: They could not be written.
        """

    def finish(self, folder: Path, files: dict[str, Stored], written: list[Any]) -> None:
        """Rank 0: write the index from what every rank's `write` returned."""


class _Sink(io.RawIOBase):
    """A file that knows its checksum. Its first error is raised at the end: torch's writers must not see it."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("wb")
        self._digest, self._size = hashlib.sha256(), 0
        self._error: OSError | None = None

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._file.write(view)
            except OSError as e:
                self._error = e
            self._digest.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def writable(self) -> bool:
        return True

    def finish(self) -> Stored:
        """Sync and close.

        Raises:
            OSError: Something could not be written.
        """
        try:
            if self._error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as e:
            self._error = e
        with contextlib.suppress(OSError):
            self._file.close()
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._path))
        return Stored(self._size, self._digest.hexdigest())


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


class _Catch:
    """In place of DeepSpeed's checkpoint engine: keeps what it is given to save, and writes nothing."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.caught: list[tuple[str, Any]] = []  # path, state

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.caught.append((path, state_dict))

    def commit(self, info: Any) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:  # what it is asked for besides
        return getattr(self._engine, name)


class ZeroWriter:
    """DeepSpeed's own files of this process, caught on their way to the disk."""

    def __init__(self, engine: Engine, staging: Staging | None):
        module = engine.deepspeed
        own = module.checkpoint_engine
        module.checkpoint_engine = catch = _Catch(own)
        module._copy_recovery_script = lambda folder: None  # it writes past the checkpoint engine
        try:
            module.save_checkpoint(".", tag=ZERO_TAG, save_latest=False)
        finally:
            module.checkpoint_engine = own
            del module._copy_recovery_script
        self._states = [(path, staging.copy_all(state) if staging else state) for path, state in catch.caught]
        if staging and engine.device.type == "cuda":
            torch.cuda.synchronize()

    def write(self, folder: Path, files: dict[str, Stored]) -> None:
        for path, state in self._states:
            name = str(Path(path))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            sink = _Sink(folder / name)
            torch.save(state, cast(IO[bytes], sink))
            files[name] = sink.finish()

    def finish(self, folder: Path, files: dict[str, Stored], written: list[Any]) -> None:
        pass


class DcpWriter:
    """A state in PyTorch's distributed checkpoint format, under `name`/."""

    def __init__(self, name: str, state: dict[str, Any], staging: Staging | None):
        self._name, self._planner, self._staged = name, _Planner(), staging is not None
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._planner.set_up_planner(state, is_coordinator=rank == 0)
        plans = _gather(self._planner.create_local_plan())
        self._metadata: Metadata | None = None
        assigned: list[SavePlan] | None = None
        if rank == 0:
            assigned, self._metadata = self._planner.create_global_plan(plans)
            assigned = self._writer(Path(name), {}).prepare_global_plan(assigned)
        self._plan = self._planner.finish_plan(_scatter(assigned))
        if staging:
            self._planner.hold(self._plan, staging)

    def _writer(self, folder: Path, files: dict[str, Stored]) -> dcp.FileSystemWriter:
        # Reading ahead from the device uses its streams: only where the state is still there.
        writer = dcp.FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0 if self._staged else 10_000_000)
        writer.fs = _Files(folder.parent, files)
        return writer

    def write(self, folder: Path, files: dict[str, Stored]) -> Any:
        (folder / self._name).mkdir(parents=True, exist_ok=True)
        return self._writer(folder / self._name, files).write_data(self._plan, self._planner).wait()

    def finish(self, folder: Path, files: dict[str, Stored], written: list[Any]) -> None:
        assert self._metadata is not None, "the index is written by the process that made the plan"
        self._writer(folder / self._name, files).finish(self._metadata, written)


class _Planner(dcp.DefaultSavePlanner):
    """PyTorch's planner, which can copy what this process will write into host memory."""

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

    def resolve_data(self, write_item: WriteItem) -> Any:
        return super().resolve_data(write_item) if self._held is None else self._held[write_item.index]


class _Files(FileSystem):
    """Writes through `_Sink` and records every file by its path below `root`."""

    def __init__(self, root: Path, files: dict[str, Stored]):
        self._root, self._record = root, files

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        sink = _Sink(Path(path))
        yield sink
        self._record[str(Path(path).relative_to(self._root))] = sink.finish()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        name, new = (str(Path(p).relative_to(self._root)) for p in (path, new_path))
        self._record[new] = self._record.pop(name)


def _gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _scatter(values: list[Any] | None) -> Any:
    """Rank 0's value for this rank."""
    if not dist.is_initialized():
        assert values is not None
        return values[0]
    box: list[Any] = [None]
    dist.scatter_object_list(box, values, src=0)
    return box[0]
