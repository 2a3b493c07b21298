"""Reading checkpoints of formats 2 to 4: PyTorch's distributed checkpoints (ddp, fsdp, hsdp) and DeepSpeed's files.

The average lies in a distributed checkpoint of its own, under every strategy.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from stamo_dist.checkpoint.manifest import CheckpointManifest
from stamo_dist.checkpoint.source import Source, make_zero, put_back
from stamo_dist.distributed.engine import ZERO_STAGE
from stamo_dist.distributed.ranges import AVERAGE, MOMENTS, WEIGHT, Range
from stamo_dist.errors import CheckpointError

_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_\d+_model_states\.pt$")


#: What an index of PyTorch's is made of, besides dtypes.
_INDEX_CLASSES = {
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # Python 3.13's name
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}


# --- PyTorch's distributed checkpoints ---


class _Distributed:
    """One folder of them: named tensors, of which rows can be read."""

    def __init__(self, folder: Path):
        self._reader = _Reader(folder)
        entries = self._reader.read_metadata().state_dict_metadata
        self.stored = {name: m for name, m in entries.items() if isinstance(m, TensorStorageMetadata)}

    def ranges(self, wanted: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Of each named tensor, flattened, (first element, how many), flat, on the CPU."""
        state, offsets, cuts = {}, {}, {}
        for name, (start, numel) in wanted.items():
            size = self.stored[name].size
            width = math.prod(size[1:])
            first, stop = (start // width, -(-(start + numel) // width)) if size else (0, 1)
            shape = (stop - first, *size[1:]) if size else ()
            state[name] = torch.empty(shape, dtype=self.stored[name].properties.dtype)
            offsets[name] = torch.Size((first, *(0 for _ in size[1:])) if size else ())
            cuts[name] = (start - first * width, numel)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=self._reader, planner=_RowPlanner(offsets), no_dist=True)
        return {name: t.view(-1).narrow(0, *cuts[name]) for name, t in state.items()}


class DcpSource(Source):
    """A checkpoint of ddp, fsdp or hsdp.

    Raises:
        CheckpointError: An index holds what PyTorch does not store there.
    """

    def __init__(self, path: Path):
        self._parts = {WEIGHT: _Distributed(path / "dcp")}
        self._parts.update(_average(path))
        state = self._parts[WEIGHT].stored
        self.shapes = {n.removeprefix("module."): tuple(m.size) for n, m in state.items() if n.startswith("module.")}
        self.trained = {name for name in self.shapes if self._key(MOMENTS[0], name) in state}
        self.averaged = AVERAGE in self._parts
        found = self._parts[WEIGHT].ranges({self._key("step", name): (0, 1) for name in self.trained})
        self._steps = {name: float(found[self._key("step", name)]) for name in self.trained}

    @staticmethod
    def _key(part: str, name: str) -> str:
        if part in (WEIGHT, AVERAGE):
            return f"{'module' if part == WEIGHT else 'ema'}.{name}"
        return f"optimizer.state.{name}.{part}"

    def step(self, name: str) -> float:
        return self._steps.get(name, 0.0)

    def _of(self, part: str) -> _Distributed | None:
        return self._parts.get(AVERAGE if part == AVERAGE else WEIGHT)

    def dtype(self, part: str, name: str) -> torch.dtype | None:
        folder = self._of(part)
        found = folder and folder.stored.get(self._key(part, name))
        return found.properties.dtype if found else None

    def fill(self, ranges: Sequence[Range]) -> None:
        _fill(self, ranges, self._read)

    def _read(self, part: str, wanted: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        folder = self._of(part)
        assert folder is not None, "only what has a dtype is asked for"
        found = folder.ranges({self._key(part, name): at for name, at in wanted.items()})
        return {name: found[self._key(part, name)] for name in wanted}


def _average(path: Path) -> dict[str, _Distributed]:
    return {AVERAGE: _Distributed(path / "ema")} if (path / "ema").is_dir() else {}


class _RowPlanner(DefaultLoadPlanner):
    """Reads into tensors that are a part of the stored ones, beginning at `offsets`."""

    def __init__(self, offsets: dict[str, torch.Size]):
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


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader, whose index is a pickle: only the classes that belong there are made."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._file = folder / ".metadata"
        self._known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._known is None:
            try:
                with self._file.open("rb") as f:
                    found = _Unpickler(f).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError) as e:
                raise CheckpointError(f"{self._file}: {str(e) or 'damaged'}") from e
            if not isinstance(found, Metadata):
                raise CheckpointError(f"{self._file}: holds what PyTorch does not store there")
            self._known = found
        return self._known


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"holds what PyTorch does not store there ({module}.{name})")


def _fill(source: Source, ranges: Sequence[Range], read: Any) -> None:
    """Copy what `read` gives into place, a part at a time."""
    for part in {part: None for r in ranges for part in r.parts}:
        some = [r for r in ranges if part in r.parts]
        wanted = {r.name: (r.start, r.numel) for r in some if source.dtype(part, r.name) and r.numel}
        found = read(part, wanted) if wanted else {}
        for r in some:
            flat = r.flat(part)
            if r.name in found:
                flat.copy_(found[r.name])
            elif r.numel:
                make_zero(flat, part, r.name)
            put_back(flat, r.parts[part])


# --- DeepSpeed's files ---


@dataclass
class _Piece:
    start: int  # in the parameter
    numel: int
    offset: int  # in each of the flat tensors
    flats: dict[str, Tensor]


class ZeroSource(Source):
    """DeepSpeed's files, one an original rank, mapped into memory: only what is copied is read.

    Raises:
        CheckpointError: Files are missing, or hold what DeepSpeed does not store.
    """

    def __init__(self, path: Path, manifest: CheckpointManifest):
        shards = sorted((int(m[1]), p) for p in path.rglob("*.pt") if (m := _SHARD.search(p.name)))
        models = sorted((int(m[1] or 0), p) for p in path.rglob("*.pt") if (m := _MODEL.search(p.name)))
        if [rank for rank, _ in shards] != list(range(manifest.world_size)) or not models:
            raise CheckpointError(
                f"{path}: holds the optimizer states of {len(shards)} of {manifest.world_size} ranks; "
                "restore the missing files or continue from another checkpoint"
            )
        self._average = _average(path).get(AVERAGE)
        self.averaged = self._average is not None
        # With zero3 the first rank's model file lists the shapes by which every rank's flat groups are cut.
        self._models = [file for _, file in models]
        self._model = load_deepspeed(self._models[0])
        self._pieces: dict[str, list[_Piece]] = {}
        self._step = 0.0
        for rank, file in shards:
            shard = load_deepspeed(file)["optimizer_state_dict"]
            for layout, flats in self._groups(shard, rank, manifest):
                for name, numel, offset in layout:
                    pieces = self._pieces.setdefault(name, [])
                    start = pieces[-1].start + pieces[-1].numel if pieces else 0
                    pieces.append(_Piece(start, numel, offset, flats))
        self.trained = set(self._pieces)
        self._others = {n: t for n, t in self._model["module"].items() if n not in self.trained and t.numel()}
        trained = {n: tuple(s) for group in self._model["param_shapes"] for n, s in group.items()}
        self._frozen = dict(self._model["frozen_param_shapes"] or {})
        self.shapes = {n: tuple(t.shape) for n, t in self._others.items()} | trained
        self.shapes |= {n: tuple(s) for n, s in self._frozen.items()}

    def _groups(self, shard: Any, rank: int, manifest: CheckpointManifest) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        if ZERO_STAGE[manifest.strategy] == 3:
            flats, states = shard["fp32_flat_groups"], shard["optimizer_state_dict"]["state"]
            layouts = [_equal_shares(shapes, rank, manifest.world_size) for shapes in self._model["param_shapes"]]
        else:
            flats, states = shard["single_partition_of_fp32_groups"], shard["base_optimizer_state"]["state"]
            layouts = [
                ((name, at.numel, at.start) for name, at in group.items()) for group in shard["param_slice_mappings"]
            ]
        for i, (flat, layout) in enumerate(zip(flats, layouts, strict=True)):
            state = states.get(i, {})
            self._step = max(self._step, float(state.get("step", 0)))
            yield layout, {WEIGHT: flat.detach(), **{key: state[key] for key in MOMENTS if key in state}}

    def step(self, name: str) -> float:
        return self._step

    def dtype(self, part: str, name: str) -> torch.dtype | None:
        if part == AVERAGE:
            found = self._average and self._average.stored.get(f"ema.{name}")
            return found.properties.dtype if found else None
        if name in self.trained:
            return torch.float32
        if part != WEIGHT or name not in self.shapes:
            return None
        return self._others[name].dtype if name in self._others else torch.float32

    def fill(self, ranges: Sequence[Range]) -> None:
        _fill(self, ranges, self._read)

    def _read(self, part: str, wanted: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        if part == AVERAGE:
            assert self._average is not None, "only what has a dtype is asked for"
            found = self._average.ranges({f"ema.{name}": at for name, at in wanted.items()})
            return {name: found[f"ema.{name}"] for name in wanted}
        return {name: self._one(part, name).narrow(0, *at) if name not in self.trained else self._cut(part, name, *at)
                for name, at in wanted.items()}  # fmt: skip

    def _one(self, part: str, name: str) -> Tensor:
        """What is not trained, flat: with zero3 every rank has its share of a parameter."""
        if name in self._others:
            return self._others[name].reshape(-1)
        fragments = [load_deepspeed(file)["frozen_param_fragments"][name] for file in self._models]
        return torch.cat([f.detach().flatten() for f in fragments])[: math.prod(self._frozen[name])]

    def _cut(self, part: str, name: str, start: int, numel: int) -> Tensor:
        found = torch.zeros(numel)
        for piece in self._pieces[name]:
            first = max(start, piece.start)
            count = min(start + numel, piece.start + piece.numel) - first
            if count > 0 and part in piece.flats:
                found.narrow(0, first - start, count).copy_(
                    piece.flats[part].narrow(0, piece.offset + first - piece.start, count)
                )
        return found


def _equal_shares(shapes: dict[str, Iterable[int]], rank: int, world: int) -> Iterator[tuple[str, int, int]]:
    """zero3's layout of one group on `rank`: name, elements without padding, offset in the flat group."""
    offset = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        share = -(-numel // world)
        yield name, min(share, max(0, numel - rank * share)), offset
        offset += share


def load_deepspeed(file: Path) -> Any:
    """What DeepSpeed stored in a file, mapped: tensors, plain values and a few classes of its own.

    Raises:
        CheckpointError: It holds classes that DeepSpeed does not store.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as e:
            raise CheckpointError(
                f"{file}: holds what DeepSpeed does not store there ({str(e).splitlines()[0]})"
            ) from e
