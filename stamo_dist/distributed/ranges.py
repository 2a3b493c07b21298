"""What a process holds of the training state: ranges of flattened tensors, under every strategy.

Of a parameter, of its fp32 master copy and of its Adam moments a process has one contiguous range: all of it (ddp),
some rows (fsdp, hsdp), a piece of a flat group (zero1, zero2) or an equal share (zero3). A checkpoint is written from
such ranges and read into such ranges, whatever they were when it was written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stamo_dist.distributed.engine import ZERO_STAGE, Engine
from stamo_dist.shares import everyone, shape_of, share_of

#: Parts of the state: the weights that AdamW steps (and buffers, and what is not trained), its moments, the average.
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"


@dataclass(frozen=True)
class Range:
    """Elements [start, start + numel) of a flattened parameter or buffer, as this process holds them.

    `parts` maps names of parts to tensors in any shape, whose elements from `offset` on these are. `replica` is (i, n)
    where n processes hold the same, of which this is the i-th.
    """

    name: str
    start: int
    numel: int
    parts: dict[str, Tensor]
    offset: int = 0
    replica: tuple[int, int] = (0, 1)

    def flat(self, part: str) -> Tensor:
        """The elements, flat: the live ones where the tensor is contiguous, else a copy."""
        return self.parts[part].reshape(-1).narrow(0, self.offset, self.numel)


def own(ranges: Iterable[Range]) -> list[Range]:
    """Of what several processes hold alike an equal share each, so that every element is of exactly one process."""
    ranges = list(ranges)
    totals: Counter[tuple[int, int]] = Counter()
    for r in ranges:
        totals[r.replica] += r.numel
    passed: Counter[tuple[int, int]] = Counter()
    found = []
    for r in ranges:
        index, count = r.replica
        share = -(-totals[r.replica] // count)
        first = max(index * share - passed[r.replica], 0)
        stop = min((index + 1) * share - passed[r.replica], r.numel)
        passed[r.replica] += r.numel
        if first < stop:
            found.append(Range(r.name, r.start + first, stop - first, r.parts, r.offset + first))
    return found


def local(tensor: Any) -> Tensor:
    """This process's shard of a tensor, or the tensor."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def place_of(tensor: Tensor) -> tuple[int, tuple[int, int]]:
    """Of a tensor that is whole or sharded along its first dimension: its first element here, and which replica."""
    if not isinstance(tensor, DTensor):
        return 0, everyone()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    index, count = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dim)
            index, count = index * size + tensor.device_mesh.get_local_rank(dim), count * size
    return int(offset[0]) * math.prod(tensor.shape[1:]), (index, count)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the parameters and persistent buffers, also where this process has shards."""
    return {n: shape_of(t) for n, t in _tensors(module).items()}


def trained(module: nn.Module) -> set[str]:
    """Names of the trained parameters."""
    return {n for n, p in module.named_parameters() if p.requires_grad}


def trained_ranges(engine: Engine) -> Iterator[Range]:
    """This process's ranges of the trained parameters: what AdamW steps and, where it has made them, the moments."""
    states = _optimizer(engine).state

    def parts(master: Tensor) -> dict[str, Tensor]:
        state = states.get(master, {})
        tensors = {WEIGHT: master, **{key: state[key] for key in MOMENTS if key in state}}
        return {key: local(t.detach()) for key, t in tensors.items()}

    if not engine.is_zero:
        for name, p in engine.unwrapped.named_parameters():
            if p.requires_grad:
                start, replica = place_of(p)
                yield Range(name, start, local(p.detach()).numel(), parts(p), replica=replica)
        return
    names = engine.deepspeed.param_names
    for group, master in zip(*_zero_groups(engine), strict=True):
        offset = 0
        for p in group:
            if ZERO_STAGE[engine.strategy] == 3:
                yield Range(names[p], *share_of(p, engine.world.rank), parts(master), offset)
                offset += p.ds_tensor.numel()
            elif p._hp_mapping is not None:
                here, whole = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                yield Range(names[p], whole.start, whole.numel, parts(master), here.start)


def other_ranges(engine: Engine) -> Iterator[Range]:
    """This process's ranges of the persistent buffers and of the parameters that are not trained."""
    names = trained(engine.unwrapped)
    for name, tensor in _tensors(engine.unwrapped).items():
        if name in names:
            continue
        if hasattr(tensor, "ds_tensor"):  # zero3, which may have gathered the tensor itself
            start, numel = share_of(tensor, engine.world.rank)
            yield Range(name, start, numel, {WEIGHT: tensor.ds_tensor.detach()})
        else:
            start, replica = place_of(tensor)
            mine = local(tensor.detach())
            yield Range(name, start, mine.numel(), {WEIGHT: mine}, replica=replica)


def steps(engine: Engine) -> dict[str, float]:
    """AdamW's step of each trained parameter that it has stepped; under ZeRO of each group of them."""
    states = _optimizer(engine).state
    found: dict[str, Tensor] = {}
    for members, master in _masters(engine):
        if "step" in (state := states.get(master, {})):
            found.update(dict.fromkeys(members, state["step"]))
    values = torch.stack([t.detach().float().reshape(()) for t in found.values()]).tolist() if found else []
    return dict(zip(found, values, strict=True))


def make_moments(engine: Engine, step: Callable[[str], float]) -> None:
    """Make AdamW's state where it has not stepped yet; `step` gives that of a parameter."""
    optimizer = _optimizer(engine)
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for members, master in _masters(engine):
        state = optimizer.state[master]
        at = max((step(name) for name in members), default=0.0)
        state["step"] = torch.tensor(at, dtype=torch.float32, device=master.device if on_device else "cpu")
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(master.detach())


def publish(engine: Engine) -> None:
    """Let the weights that the model computes with follow the master copies that were read."""
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


def before_reading(engine: Engine) -> None:
    """Small parameters may be gathered under zero3: all become shares, until `publish`."""
    if engine.is_zero and ZERO_STAGE[engine.strategy] == 3:
        engine.deepspeed.optimizer.checkpoint_event_prologue()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; what has several names under its first."""
    found: dict[str, Tensor] = dict(module.named_parameters())
    found.update((n, b) for n, b in module.named_buffers() if _is_persistent(module, n))
    return found


def _is_persistent(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf not in module.get_submodule(owner)._non_persistent_buffers_set


def _optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The one that holds the moments."""
    found: torch.optim.Optimizer = engine.deepspeed.optimizer.optimizer if engine.is_zero else engine.inner_optimizer
    return found


def _masters(engine: Engine) -> Iterator[tuple[list[str], Tensor]]:
    """What AdamW steps, and the names of the parameters in it, wherever their elements are."""
    if not engine.is_zero:
        yield from (([name], p) for name, p in engine.unwrapped.named_parameters() if p.requires_grad)
        return
    names = engine.deepspeed.param_names
    groups, masters = _zero_groups(engine)
    for group, master in zip(groups, masters, strict=True):
        yield [names[p] for p in group], master


def _zero_groups(engine: Engine) -> tuple[Any, Any]:
    zero = engine.deepspeed.optimizer
    if ZERO_STAGE[engine.strategy] == 3:
        return zero.fp16_groups, zero.fp32_partitioned_groups_flat
    if hasattr(zero, "bf16_groups"):  # zero1 in bf16 is DeepSpeed's BF16_Optimizer
        return zero.bf16_groups, zero.fp32_groups_flat_partition
    return zero.bit16_groups, zero.single_partition_of_fp32_groups
