"""`stamo encode`: caches the outputs of frozen models for every frame beside the shards.

A tokenizer's recipe asks for the latents of its VAE, a policy's for the states of its tokenizer. Works shard by shard:
each process has its own shards, and complete ones are skipped on a restart. Within a shard, frames are batched
identically on any number of processes, so the bytes are the same too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from stamo_dist.data.frame_cache import Kind, Precision, has_cache, write_cache, write_manifests
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.shards import MappedShard
from stamo_dist.device import Device
from stamo_dist.distributed.rank import World
from stamo_dist.errors import RecipeError
from stamo_dist.models.exported import exported
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.models.vae import VAE
from stamo_dist.recipe.schema import Recipe


@dataclass(frozen=True)
class FrameEncoder:
    """A function that computes the cached row of a frame."""

    kind: Kind
    fingerprint: str
    precision: Precision
    rows: Callable[[Tensor], Tensor]  # uint8 (b, H, W, 3) → (b, …) in the stored format
    about: dict[str, Any]  # for the manifests


def encode(recipe: Recipe, world: World) -> int:
    """Write the missing rows for the recipe's sources; returns the number of shards this process encoded.

    Latents are the posterior means, normalised by the VAE's shift and scale, in bfloat16; states are float32, computed
    in float32.

    Raises:
        RecipeError: The recipe names no trained VAE, or no tokenizer that reads frames of this size.
        DataError: A source cannot be read, or its folder cannot be written.
    """
    device = Device.current()
    device.select(world.local_rank)
    mixture = Mixture(recipe.data, seed=recipe.seed, global_batch=recipe.train.global_batch)
    encoder = (_states if recipe.stage == "policy" else _latents)(recipe, device)
    kind, fingerprint = encoder.kind, encoder.fingerprint

    # Divided by shard number, not by missing rows: another process may have started earlier or check later.
    mine = range(world.rank, len(mixture.shards), world.size)
    missing = [i for i in mine if not has_cache(mixture.shards[i], kind, fingerprint)]
    frames = sum(mixture.shards[i].samples for i in missing)
    done = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"))
    with Progress(*done, TimeRemainingColumn(), disable=not world.is_main) as progress:
        bar = progress.add_task(f"{kind} of {len(missing)} of this process's {len(mine)} shards", total=frames)
        for i in missing:
            shard = mixture.views[0].open(i)
            parts = []
            for start in range(0, len(shard), recipe.train.micro_batch):
                stop = min(len(shard), start + recipe.train.micro_batch)
                images = torch.from_numpy(_frames(shard, start, stop, recipe.data.image_size))
                with torch.no_grad():
                    parts.append(encoder.rows(device.upload(images)).cpu().numpy())
                progress.advance(bar, len(images))
            write_cache(mixture.shards[i], kind, fingerprint, np.concatenate(parts), encoder.precision)
    write_manifests(mixture.shards, kind, fingerprint, encoder.about)
    return len(missing)


def _latents(recipe: Recipe, device: Device) -> FrameEncoder:
    if recipe.model.vae.weights is None:
        raise RecipeError(["model.vae.weights: is missing, and the latents of a random VAE are of no use"])
    vae = VAE.from_config(recipe.model.vae.model_copy(update={"latent": "mean"}), recipe.data.image_size)
    fingerprint = vae.fingerprint()
    vae.requires_grad_(False).eval().to(device.torch_device, device.dtype())

    def encode(images: Tensor) -> Tensor:
        return vae.encode(images).to(torch.bfloat16).view(torch.int16)

    return FrameEncoder("latents", fingerprint, "bfloat16", encode, {"model": recipe.model.vae.weights})


def _states(recipe: Recipe, device: Device) -> FrameEncoder:
    folder = recipe.policy.tokenizer
    if folder is None:
        raise RecipeError(["policy.tokenizer: is missing: name the run folder of the tokenizer whose states to write"])
    about = exported(folder)[1]
    sizes = (about["image_size"], about["model"]["encoder"]["image_size"])
    if recipe.data.image_size not in sizes:
        raise RecipeError(
            [f"data.image_size: frames of {recipe.data.image_size} px, but policy.tokenizer reads {sizes[0]} px"]
        )
    tokenizer = StateEncoder.from_pretrained(folder).to(device.torch_device)
    return FrameEncoder("states", tokenizer.fingerprint, "float32", tokenizer.encode, {"model": folder})


def _frames(shard: MappedShard, start: int, stop: int, size: int) -> NDArray[np.uint8]:
    images = np.empty((stop - start, size, size, 3), np.uint8)
    for out, i in zip(images, range(start, stop), strict=True):
        shard.frame(i, out)
    return images
