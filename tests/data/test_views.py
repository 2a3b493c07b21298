"""Several cameras of the same moment."""

from __future__ import annotations

import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from made import colour, make_data, write_source

from stamo_dist.data.instructions import Instructions, episode_tables
from stamo_dist.data.loader import Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.shards import OpenShards
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import SourceConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cameras whose shards have other bounds."""
    found = write_source(tmp_path / "s", lengths=(14, 13, 13, 9), cameras=("front", "wrist"))
    other = write_source(tmp_path / "other" / "s", lengths=(14, 13, 13, 9), cameras=("wrist",), shard_bytes=12_000)
    shutil.rmtree(found / "train/wrist")
    shutil.move(other / "train/wrist", found / "train/wrist")
    return found


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("order", [("front", "wrist"), ("wrist", "front")])
def test_each_moment_is_seen_by_all_cameras(folder: Path, workers: int, order: tuple[str, str]) -> None:
    data = make_data({"s": SourceConfig(path=str(folder), cameras=list(order), instruction="push")}, views=2, horizon=3)
    mixture = Mixture(data, seed=0, global_batch=7)
    counts = [len(view.shards) for view in mixture.views]
    assert counts[0] != counts[1]
    assert mixture.num_samples == 49, "the cameras are no samples of their own"
    shards = OpenShards(mixture.shards)
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=workers)
    with closing(loader):
        for batch in islice(loader, 14):
            cameras = batch.cameras().numpy().astype(int)
            assert cameras.shape == (7, 2, 32, 32, 3)
            for seen, sample in zip(cameras, batch.sample.numpy(), strict=True):
                number = int(mixture.shard_of(sample))
                row = shards[number].sample(int(sample - mixture.first[number]), ["episode", "t"])
                for picture, camera in zip(seen, order, strict=True):
                    expected = colour("s", camera, int(row["episode"].split("-")[1]), row["t"])
                    assert np.abs(picture - expected).max() <= 3
    assert len(Instructions(mixture, episode_tables(mixture))._begins) == 4


def test_views_decide_what_a_run_reads(folder: Path) -> None:
    source = {"s": SourceConfig(path=str(folder))}
    one, two = (Mixture(make_data(source, views=n), seed=0, global_batch=4).fingerprint for n in (1, 2))
    assert one != two
    with pytest.raises(DataError, match=r"has 2 of the 3 cameras that data.views reads \(front, wrist\)"):
        Mixture(make_data(source, views=3), seed=0, global_batch=4)
