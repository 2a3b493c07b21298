"""`stamo encode`: the frozen VAE's latents of every frame, written once beside the shards.

Works shard by shard: the processes share the shards out, whole shards are skipped when it is started again.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stamo_dist.data.latents import has_latents, write_latents
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.shards import MappedShard
from stamo_dist.engine.world import World
from stamo_dist.errors import RecipeError
from stamo_dist.models.vae import VAE
from stamo_dist.recipe.schema import Recipe


def encode(recipe: Recipe, world: World) -> int:
    """Write the missing latents of the recipe's sources; returns how many shards this process encoded.

    Latents are the posterior means, normalised by the VAE's shift and scale, in bfloat16.

    Raises:
        RecipeError: The recipe names no trained VAE.
        DataError: A source cannot be read or its folder not be written.
    """
    if recipe.model.vae.weights is None:
        raise RecipeError(["model.vae.weights: is missing, and the latents of a random VAE are of no use"])
    mixture = Mixture(recipe.data, seed=recipe.seed, global_batch=recipe.train.global_batch)
    vae = VAE.from_config(recipe.model.vae.model_copy(update={"latent": "mean"}), recipe.data.image_size)
    fingerprint = vae.fingerprint()
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    vae.requires_grad_(False).eval().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)

    missing = [i for i, shard in enumerate(mixture.shards) if not has_latents(shard, fingerprint)]
    # Not every size-th of the missing ones: another process may have started earlier, and found more of them.
    mine = [i for i in missing if i % world.size == world.rank]
    frames = sum(mixture.shards[i].samples for i in mine)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"),
        TimeRemainingColumn(), disable=not world.is_main,
    ) as progress:  # fmt: skip
        bar = progress.add_task(f"encoding {len(missing)} of {len(mixture.shards)} shards", total=frames)
        for i in mine:
            mixture.prepare(i)
            shard = MappedShard(mixture.shards[i])
            parts = []
            for start in range(0, len(shard), recipe.train.micro_batch):
                images = _frames(
                    shard, start, min(len(shard), start + recipe.train.micro_batch), recipe.data.image_size
                )
                with torch.no_grad():
                    z0 = vae.encode(torch.from_numpy(images).to(device))
                parts.append(z0.to(torch.bfloat16).view(torch.int16).cpu().numpy())
                progress.advance(bar, len(images))
            write_latents(mixture.shards[i], fingerprint, np.concatenate(parts), "bfloat16")
    return len(mine)


def _frames(shard: MappedShard, start: int, stop: int, size: int) -> NDArray[np.uint8]:
    images = np.empty((stop - start, size, size, 3), np.uint8)
    for out, i in zip(images, range(start, stop), strict=True):
        shard.frame(i, out)
    return images
