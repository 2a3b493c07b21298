"""`stamo encode`: caches the outputs of frozen models for every frame beside the shards.

A tokenizer's recipe asks for the latents of its VAE, a policy's for the states of its tokenizer. Works shard by shard:
each process has its own shards, and complete ones are skipped on a restart. Within a shard, frames are batched
identically on any number of processes, so the bytes are the same too.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stamo_dist.data.frame_cache import has_cache, write_cache, write_manifests
from stamo_dist.data.mixture import Mixture
from stamo_dist.device import Device
from stamo_dist.distributed.rank import World
from stamo_dist.encode import encoders, flow
from stamo_dist.recipe.schema import Recipe
from stamo_dist.words import counted

_READERS = 8  # threads that decode, at most


@dataclass(frozen=True)
class EncodeOutcome:
    """What a process did.

    Attributes:
        shards: That it encoded.
        arithmetic: In which.
        error: Of that, from fp32: relative, root of the mean square; None in fp32.
        seconds: From the end of the first batch, which warms up, to the last row on disk.
    """

    shards: int
    arithmetic: str
    error: float | None
    seconds: float


def encode(recipe: Recipe, world: World, arithmetic: str | None = None, *, compiled: bool = False) -> EncodeOutcome:
    """Write the missing rows for the recipe's sources.

    Latents are the posterior means, normalised by the VAE's shift and scale, in bfloat16; states are float32.

    Args:
        recipe: Of a tokenizer or a policy.
        world: The processes that share the shards.
        arithmetic: fp32, tf32 or bf16; when omitted states are computed in fp32, and latents in bf16 on a GPU.
        compiled: Compile the model first.

    Raises:
        RecipeError: The recipe names no trained VAE, or no tokenizer that reads frames of this size.
        RunError: The device does not have that arithmetic.
        DataError: A source cannot be read, or its folder cannot be written.
    """
    device = Device.current()
    device.select(world.local_rank)
    mixture = Mixture(recipe.data, seed=recipe.seed, global_batch=recipe.train.global_batch)
    encoder = encoders.build(recipe, device)
    chosen, batch, error = encoders.arithmetic_of(arithmetic, encoder, device), recipe.train.micro_batch, None
    kind, fingerprint = encoder.kind, encoder.fingerprint

    # Divided by shard number, not by missing rows: another process may have started earlier or check later.
    mine = range(world.rank, len(mixture.shards), world.size)
    missing = [i for i in mine if not has_cache(mixture.shards[i], kind, fingerprint)]
    frames = sum(mixture.shards[i].samples for i in missing)

    def write(shard: int, rows: NDArray[np.generic]) -> None:
        write_cache(mixture.shards[shard], kind, fingerprint, rows, encoder.stored, computed=chosen)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"))
    run = began = None
    with (
        Progress(*columns, TimeRemainingColumn(), disable=not world.is_main) as progress,
        ThreadPoolExecutor(readers(world), "reader") as pool,
        flow.Writer(write, device) as writer,
        torch.no_grad(),
    ):
        bar = progress.add_task(f"{kind}: {len(missing)} of {counted(len(mine), 'shard')}", total=frames)
        read = flow.decoded(missing, mixture.views[0].open, batch, recipe.data.image_size, pool)
        for part in flow.ahead(read, device):
            images = part.on_device()
            if run is None:
                error = encoders.lowered(encoder, chosen, device, images)
                run = encoders.function(encoder, compiled=compiled, batch=batch)
            writer.put(part, run(images))
            if began is None:
                device.synchronize()
                began = time.perf_counter()
            progress.advance(bar, len(images))
    seconds = 0.0 if began is None else time.perf_counter() - began
    write_manifests(mixture.shards, kind, fingerprint, encoder.about)
    return EncodeOutcome(len(missing), chosen, error, seconds)


def readers(world: World) -> int:
    """Threads of this process that decode: its share of the cores."""
    return max(1, min(_READERS, len(os.sched_getaffinity(0)) // world.local_size))
