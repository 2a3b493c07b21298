"""Continuing from a checkpoint of another strategy or number of processes.

Under every strategy a process holds one contiguous range of each flattened parameter, of its fp32 master copy and of
its Adam moments: all of it (ddp), some rows (fsdp, hsdp), a piece of a flat group (zero1, zero2) or an equal share
(zero3). So each process requests its own ranges by the parameter's name, and they are assembled from the ranges
that the writers stored. Nothing is converted on disk.
"""

from __future__ import annotations

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stamo_dist.checkpoint import deepspeed_files
from stamo_dist.checkpoint.manifest import CheckpointManifest
from stamo_dist.distributed import dcp
from stamo_dist.distributed.engine import ZERO_STAGE, Engine
from stamo_dist.errors import CheckpointError
from stamo_dist.tracking.progress import BytesProgress

MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHT = "fp32"
_AT_ONCE = 1 << 26  # elements read between two updates of the progress bar; bounds the memory of a DCP read
_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_\d+_model_states\.pt$")


@dataclass
class Range:
    """Elements [start, start + numel) of a flattened parameter, and this process's destination for them.

    `into` maps "fp32" and the moments' names to flat tensors of `numel` elements.
    """

    name: str
    start: int
    numel: int
    into: dict[str, Tensor]


def needed(manifest: CheckpointManifest, engine: Engine) -> bool:
    """Whether `load` is needed: ZeRO with another strategy or world size (PyTorch's format reshards itself)."""
    zero = engine.is_zero or manifest.strategy in ZERO_STAGE
    return zero and (manifest.strategy, manifest.world_size) != (engine.strategy, engine.world.size)


def load(path: Path, manifest: CheckpointManifest, engine: Engine) -> str:
    """Fill `engine` with the weights, buffers and AdamW state of a checkpoint of any strategy and world size.

    Every process calls it and reads only what it keeps. Returns notes for the user.

    Raises:
        CheckpointError: The checkpoint holds another model, or ZeRO files are missing.
    """
    source: _Source = _Zero(path, manifest) if manifest.strategy in ZERO_STAGE else _Distributed(path / "dcp")
    module = engine.unwrapped
    trained = {n: int(getattr(p, "ds_numel", p.numel())) for n, p in module.named_parameters() if p.requires_grad}
    wrong = {n for n, size in trained.items() if source.sizes.get(n) != size} | (source.trained - set(trained))
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} trained parameters are missing, new or of another size: "
            f"{', '.join(sorted(wrong)[:5])}; restore the recipe's model and what it trains, or choose another run_dir"
        )
    before = f"{manifest.strategy} on {manifest.world_size}"
    with torch.no_grad(), BytesProgress(f"{path.name}, of {before}", shown=engine.world.is_main) as progress:
        ranges = _targets(engine, module, source.step)
        progress.total = sum(4 * r.numel * len(r.into) for r in ranges)
        for some in _batches(ranges):
            source.fill(some)
            progress.advance(sum(4 * r.numel * len(r.into) for r in some))
        _publish(engine)
        buffers = dict(module.named_buffers())
        for name, value in source.buffers(set(buffers)).items():
            buffers[name].copy_(value)
    return (
        f"{path.name} was written by {before} processes and goes on as {engine.strategy} on {engine.world.size}: "
        "weights, AdamW's moments and step, moving average and data position are carried; sums are taken in another "
        "order, so losses agree to about 1e-5 and not to the bit"
    )


def read_zero(path: Path, manifest: CheckpointManifest) -> dict[str, Tensor]:
    """The trained module's fp32 state dict from DeepSpeed's files, without a process group.

    Unlike DeepSpeed's own script, it also reads zero1 in bf16.

    Raises:
        CheckpointError: Files are missing.
    """
    return _Zero(path, manifest).whole()


def _batches(ranges: list[Range]) -> Iterator[list[Range]]:
    ends = itertools.accumulate(r.numel for r in ranges)
    for _, some in itertools.groupby(zip(ends, ranges, strict=True), key=lambda pair: pair[0] // _AT_ONCE):
        yield [r for _, r in some]


# --- the source: the checkpoint ---


class _Source(ABC):
    """A checkpoint as named parameters.

    `sizes`: name → elements of every available parameter; `trained`: those with optimizer state; `step`: AdamW's.
    """

    sizes: dict[str, int]
    trained: set[str]
    step: float

    @abstractmethod
    def fill(self, ranges: list[Range]) -> None:
        """Copy the ranges' weights and moments into place; missing moments are zero."""

    @abstractmethod
    def buffers(self, names: set[str]) -> dict[str, Tensor]:
        """The named buffers, as far as the checkpoint has them."""


@dataclass
class _Piece:
    start: int  # in the parameter
    numel: int
    offset: int  # in each of the flat tensors
    flats: dict[str, Tensor]


class _Zero(_Source):
    """DeepSpeed's files, one per original rank, memory-mapped: only what is copied is read."""

    def __init__(self, path: Path, manifest: CheckpointManifest):
        shards = sorted((int(m[1]), p) for p in path.rglob("*.pt") if (m := _SHARD.search(p.name)))
        models = sorted((int(m[1] or 0), p) for p in path.rglob("*.pt") if (m := _MODEL.search(p.name)))
        if [rank for rank, _ in shards] != list(range(manifest.world_size)) or not models:
            raise CheckpointError(
                f"{path}: holds the optimizer states of {len(shards)} of {manifest.world_size} ranks; "
                "restore the missing files or continue from another checkpoint"
            )
        # With zero3 the first rank's model file lists the shapes by which every rank's flat groups are cut.
        self._models = [file for _, file in models]
        self._model = deepspeed_files.load(self._models[0], mmap=True)
        self._pieces: dict[str, list[_Piece]] = {}
        steps: list[float] = []
        for rank, file in shards:
            shard = deepspeed_files.load(file, mmap=True)["optimizer_state_dict"]
            if ZERO_STAGE[manifest.strategy] == 3:
                flats, states = shard["fp32_flat_groups"], shard["optimizer_state_dict"]["state"]
                layouts = [_equal_shares(shapes, rank, manifest.world_size) for shapes in self._model["param_shapes"]]
            else:
                flats, states = shard["single_partition_of_fp32_groups"], shard["base_optimizer_state"]["state"]
                layouts = [
                    ((name, at.numel, at.start) for name, at in group.items())
                    for group in shard["param_slice_mappings"]
                ]
            for i, (flat, layout) in enumerate(zip(flats, layouts, strict=True)):
                state = states.get(i, {})
                steps.append(float(state.get("step", 0)))
                parts = {_WEIGHT: flat.detach(), **{key: state[key] for key in MOMENTS if key in state}}
                for name, numel, offset in layout:
                    pieces = self._pieces.setdefault(name, [])
                    start = pieces[-1].start + pieces[-1].numel if pieces else 0
                    pieces.append(_Piece(start, numel, offset, parts))
        self.step = max(steps)
        self.sizes = {name: pieces[-1].start + pieces[-1].numel for name, pieces in self._pieces.items()}
        self.trained = set(self.sizes)

    def fill(self, ranges: list[Range]) -> None:
        for r in ranges:
            for piece in self._pieces[r.name]:
                first = max(r.start, piece.start)
                numel = min(r.start + r.numel, piece.start + piece.numel) - first
                if numel <= 0:
                    continue
                for key, target in r.into.items():
                    part = target.narrow(0, first - r.start, numel)
                    if key in piece.flats:
                        part.copy_(piece.flats[key].narrow(0, piece.offset + first - piece.start, numel))
                    else:
                        part.zero_()

    def buffers(self, names: set[str]) -> dict[str, Tensor]:
        return {n: t for n, t in self._model["module"].items() if n in names}

    def whole(self) -> dict[str, Tensor]:
        """All parameters and buffers, trained or not, in fp32."""
        others = {n: t for n, t in self._model["module"].items() if n not in self.sizes and t.numel()}
        state = {n: t.float() if t.is_floating_point() else t for n, t in others.items()}
        if shapes := self._model["frozen_param_shapes"]:  # with zero3 every rank has a share of them
            fragments = [deepspeed_files.load(file, mmap=True)["frozen_param_fragments"] for file in self._models]
            for name, shape in shapes.items():
                flat = torch.cat([part[name].detach().flatten() for part in fragments]).float()
                state[name] = flat[: math.prod(shape)].view(tuple(shape))
        for name, shape in ((n, s) for group in self._model["param_shapes"] for n, s in group.items()):
            flat = torch.empty(self.sizes[name])
            self.fill([Range(name, 0, flat.numel(), {_WEIGHT: flat})])
            state[name] = flat.view(tuple(shape))
        return state


def _equal_shares(shapes: dict[str, Iterable[int]], rank: int, world: int) -> Iterator[tuple[str, int, int]]:
    """zero3's layout of one group on `rank`: name, elements without padding, offset in the flat group."""
    offset = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        share = -(-numel // world)
        yield name, min(share, max(0, numel - rank * share)), offset
        offset += share


class _Distributed(_Source):
    """PyTorch's distributed checkpoint; a process reads only the rows that contain its ranges."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._stored = dcp.tensors(folder)
        self.sizes = {
            key.removeprefix("module."): m.size.numel() for key, m in self._stored.items() if key.startswith("module.")
        }
        self.trained = {n for n in self.sizes if self._key(n, MOMENTS[0]) in self._stored}
        steps = {self._key(n, "step"): (0, 1) for n in self.trained}
        self.step = max((float(t) for t in dcp.read_rows(folder, steps).values()), default=0.0)

    @staticmethod
    def _key(name: str, part: str) -> str:
        return f"module.{name}" if part == _WEIGHT else f"optimizer.state.{name}.{part}"

    def fill(self, ranges: list[Range]) -> None:
        keys = {(r.name, part): self._key(r.name, part) for r in ranges for part in r.into}
        wanted = {keys[r.name, part]: (r.start, r.numel) for r in ranges for part in r.into}
        found = dcp.read_ranges(self._folder, {key: wanted[key] for key in wanted if key in self._stored})
        for r in ranges:
            for part, target in r.into.items():
                key = keys[r.name, part]
                if key in found:
                    target.copy_(found[key])
                else:
                    target.zero_()

    def buffers(self, names: set[str]) -> dict[str, Tensor]:
        keys = {n: self._key(n, _WEIGHT) for n in names if n in self.sizes}
        rows = dcp.read_rows(self._folder, {k: (0, (self._stored[k].size or (1,))[0]) for k in keys.values()})
        return {n: rows[k] for n, k in keys.items()}


# --- the destination: this process ---


def _targets(engine: Engine, module: nn.Module, step: float) -> list[Range]:
    """This process's ranges of every trained parameter, after creating AdamW's state and setting its step."""
    if not engine.is_zero:
        return list(_tensor_targets(engine, module, step))
    zero, names = engine.deepspeed.optimizer, engine.deepspeed.param_names
    if ZERO_STAGE[engine.strategy] == 3:
        zero.checkpoint_event_prologue()  # small parameters may be gathered: partition them first
        return list(_zero3_targets(zero, names, engine.world.rank, step))
    return list(_zero12_targets(zero, names, step))


def _tensor_targets(engine: Engine, module: nn.Module, step: float) -> Iterator[Range]:
    from torch.distributed.tensor import DTensor

    optimizer = engine.inner_optimizer
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        start = 0
        if isinstance(p, DTensor):  # sharded along its first dimension, so a range
            start = dcp.offset_of(p)
        into = _state(optimizer, p, step)
        flat = {key: _local(t).view(-1) for key, t in {_WEIGHT: p.detach(), **into}.items()}
        yield Range(name, start, flat[_WEIGHT].numel(), flat)


def _zero12_targets(zero: Any, names: dict[Tensor, str], step: float) -> Iterator[Range]:
    # zero1 in bf16 uses DeepSpeed's BF16_Optimizer, whose attributes have other names.
    bf16 = hasattr(zero, "bf16_groups")
    groups = zero.bf16_groups if bf16 else zero.bit16_groups
    flats = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups
    for group, flat in zip(groups, flats, strict=True):
        parts = {_WEIGHT: flat.detach(), **_state(zero.optimizer, flat, step)}
        for p in group:
            if p._hp_mapping is not None:
                mine, whole = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                into = {key: t.narrow(0, mine.start, mine.numel) for key, t in parts.items()}
                yield Range(names[p], whole.start, whole.numel, into)


def _zero3_targets(zero: Any, names: dict[Tensor, str], rank: int, step: float) -> Iterator[Range]:
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        parts = {_WEIGHT: flat.detach(), **_state(zero.optimizer, flat, step)}
        offset = 0
        for p in group:
            share = p.partition_numel()
            start = min(rank * share, p.ds_numel)
            numel = min(share, p.ds_numel - start)
            yield Range(names[p], start, numel, {key: t.narrow(0, offset, numel) for key, t in parts.items()})
            offset += share


def _state(optimizer: torch.optim.Optimizer, p: Tensor, step: float) -> dict[str, Tensor]:
    """AdamW's moments of `p`, created if it has not stepped yet; sets its step."""
    state = optimizer.state[p]
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    state["step"] = torch.tensor(step, dtype=torch.float32, device=p.device if on_device else "cpu")
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(p.detach())
    return {key: state[key] for key in MOMENTS}


def _local(t: Any) -> Tensor:
    local: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return local


def _publish(engine: Engine) -> None:
    """Copy the fp32 master copies to the weights that the model computes with."""
    if not engine.is_zero:
        return
    zero = engine.deepspeed.optimizer
    if ZERO_STAGE[engine.strategy] < 3:
        zero.update_lp_params()
        return
    for i, master in enumerate(zero.fp32_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[i].copy_(master)
        shares = zero.fp16_partitioned_groups[i]
        for share, value in zip(shares, zero.unflatten(zero.fp16_partitioned_groups_flat[i], shares), strict=True):
            share.data = value.data
    zero.checkpoint_event_epilogue()
