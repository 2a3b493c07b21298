"""Loading a checkpoint into the running engine, under any strategy and on any number of processes, or without one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stamo_dist.checkpoint.compatibility import sources_of
from stamo_dist.checkpoint.earlier import DcpSource, ZeroSource
from stamo_dist.checkpoint.manifest import Checkpoint, damage, damaged, read_checkpoint_manifest
from stamo_dist.checkpoint.source import Source, StateSource, batches
from stamo_dist.checkpoint.state_writer import STATE
from stamo_dist.distributed import ranges
from stamo_dist.distributed.engine import ZERO_STAGE, Engine
from stamo_dist.distributed.ranges import AVERAGE, WEIGHT, Range
from stamo_dist.errors import CheckpointError
from stamo_dist.optim.ema import EMA
from stamo_dist.run.state import RunState
from stamo_dist.tracking.progress import BytesProgress


def open_source(checkpoint: Checkpoint) -> Source:
    """The tensors of a checkpoint of any format.

    Raises:
        CheckpointError: Its files are not what that format has.
    """
    path, manifest = checkpoint
    if manifest.format_version > 4:
        return StateSource(path / STATE)
    return ZeroSource(path, manifest) if manifest.strategy in ZERO_STAGE else DcpSource(path)


def load_checkpoint(
    checkpoint: Checkpoint,
    engine: Engine,
    ema: EMA | None,
    *,
    precision: str,
    sources: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> RunState:
    """Load weights, optimizer and average into the running engine; every process calls it and reads what it keeps.

    The files' checksums were verified by `verify_or_fall_back`. `sources`: the run's sources, if they may differ from
    the checkpoint's; samples seen are matched by name. `say` is called with notes for the user, on rank 0.

    Raises:
        CheckpointError: The checkpoint was written in another precision, holds another model, or cannot be read.
    """
    path, manifest = checkpoint
    if manifest.precision != precision:
        raise CheckpointError(
            f"{path}: saved in {manifest.precision}, the recipe says {precision}; set train.precision"
        )
    source = open_source(checkpoint)
    if wrong := _mismatched(source, engine, whole=manifest.holds_all):
        raise CheckpointError(
            f"{path}: {len(wrong)} trained parameters are missing, new or of another size: "
            f"{', '.join(sorted(wrong)[:5])}; restore the recipe's model and what it trains, or choose another run_dir"
        )
    before, now = (manifest.strategy, manifest.world_size), (engine.strategy, engine.world.size)
    if before != now and engine.world.is_main:
        say(
            f"{path.name} was written by {before[0]} on {before[1]} processes and goes on as {now[0]} on {now[1]}: "
            "weights, AdamW's moments and step, moving average and data position are carried; sums are taken in "
            "another order, so losses agree to about 1e-5 and not to the bit"
        )
    try:
        _load(source, engine, ema, path)
    except (RuntimeError, ValueError, KeyError) as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{path}: does not fit the model or optimizer of the recipe: {why}") from e
    state = copy.deepcopy(manifest.state)
    if sources is not None:
        for name in ("samples", "skipped"):
            counted = dict(zip(sources_of(manifest.recipe), getattr(state, name), strict=False))
            setattr(state, name, [counted.get(source, 0) for source in sources])
    return state


def _load(source: Source, engine: Engine, ema: EMA | None, path: Path) -> None:
    with torch.no_grad(), BytesProgress(path.name, shown=engine.world.is_main) as progress:
        ranges.before_reading(engine)
        ranges.make_moments(engine, source.step)
        wanted = [*ranges.trained_ranges(engine), *_others(engine, source)]
        average = list(ema.held()) if ema is not None and source.averaged else []
        progress.total = sum(_bytes(r) for r in (*wanted, *average))
        _fill(source, wanted, progress.advance)
        ranges.publish(engine)
        _fill(source, average, progress.advance)
    if ema is not None and not source.averaged:
        ema.begin()


def _mismatched(source: Source, engine: Engine, *, whole: bool) -> set[str]:
    """Parameters and buffers that only one of the two has, or in another size; `whole`: also what is not trained."""
    shapes, trained = ranges.shapes(engine.unwrapped), ranges.trained(engine.unwrapped)
    sizes, stored = ({n: math.prod(s) for n, s in some.items()} for some in (shapes, source.shapes))
    names = (set(sizes) | set(stored)) if whole else trained | source.trained
    return {n for n in names if sizes.get(n) != stored.get(n)} | (source.trained - trained)


def _others(engine: Engine, source: Source) -> list[Range]:
    return [r for r in ranges.other_ranges(engine) if r.name in source.shapes]


def _bytes(r: Range) -> int:
    return sum(r.numel * t.dtype.itemsize for t in r.parts.values())


def _fill(source: Source, wanted: list[Range], advance: Callable[[int], None]) -> None:
    for some in batches(wanted):
        source.fill(some)
        advance(sum(map(_bytes, some)))


def read_weights(path: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The trained module's full state dict from one checkpoint, without a process group.

    `ema`: take the moving average in place of the trained parameters, if the checkpoint has one.

    Raises:
        CheckpointError: It is incomplete, or a file is damaged.
    """
    manifest = read_checkpoint_manifest(path)
    if wrong := damage(path, manifest):
        raise damaged(path, wrong)
    source = open_source(Checkpoint(path, manifest))
    weights = source.whole(WEIGHT)
    if ema and source.averaged:
        weights.update(source.whole(AVERAGE))
    return weights
