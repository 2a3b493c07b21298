"""Cached latents arrive with their frames, and only when they belong to them."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from made import make_data, write_source

from stamo_dist.data.frame_cache import Precision, cache_path, find_cache, has_cache, write_cache
from stamo_dist.data.loader import CacheKeys, Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import SourceConfig

VAE = "0123456789abcdef0123"


def cache(mixture: Mixture, precision: Precision) -> None:
    """Latents whose values say which sample they belong to."""
    for shard, first in zip(mixture.shards, mixture.first, strict=True):
        samples = torch.arange(first, first + shard.samples).float()
        latents = samples[:, None, None, None].expand(-1, 4, 2, 2).to(getattr(torch, precision))
        write_cache(shard, "latents", VAE, latents.contiguous().view(torch.int16).numpy(), precision)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("workers", [0, 1])
def test_latents_come_with_their_frames(tmp_path: Path, precision: Precision, workers: int) -> None:
    folder = write_source(tmp_path / "s", lengths=(14, 13, 13))
    mixture = Mixture(make_data({"s": SourceConfig(path=str(folder))}, latents="cached"), seed=0, global_batch=4)
    cache(mixture, precision)
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=workers, caches=CacheKeys(VAE))
    with closing(loader):
        for batch in islice(loader, 12):
            assert batch.latents is not None
            assert batch.latents.dtype == getattr(torch, precision)
            assert batch.latents.shape == (4, 4, 2, 2)
            assert batch.latents.float().mean((1, 2, 3)).tolist() == batch.sample.tolist()
            assert batch.split(3)[1].latents is not None


def test_missing_and_stale_caches_are_listed_with_the_command(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "s", lengths=(14, 13, 13))
    mixture = Mixture(make_data({"s": SourceConfig(path=str(folder))}, latents="cached"), seed=0, global_batch=4)
    n = len(mixture.shards)
    assert n >= 3
    with pytest.raises(DataError, match=f"not cached for {n} of {n} shards") as caught:
        build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), caches=CacheKeys(VAE))
    assert "run `stamo encode RECIPE`" in str(caught.value)

    cache(mixture, "float16")
    assert find_cache(mixture.shards, "latents", VAE).shape == (4, 2, 2)
    assert not has_cache(mixture.shards[0], "latents", "another VAE")
    # Shard 0 was encoded from other frames, the array of shard 1 is cut short, shard 2 was killed while it was written.
    paths = [cache_path(shard, "latents", VAE) for shard in mixture.shards]
    meta = json.loads(paths[0].with_suffix(".json").read_text())
    paths[0].with_suffix(".json").write_text(json.dumps({**meta, "shard": "of yesterday"}))
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    paths[2].with_suffix(".json").unlink()
    with pytest.raises(DataError) as caught:
        find_cache(mixture.shards, "latents", VAE)
    for part in ("shard.00000.npy: stale", "shard.00001.npy: cut short", "shard.00002.npy: missing"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="do not fit latents"):
        write_cache(mixture.shards[0], "latents", VAE, np.zeros((1, 4, 2, 2), np.float16), "float16")
