"""Shards: mapped, unpacked and fetched."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from made import make_data, write_source

from stamo_dist.data.loader import Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.shards import MappedShard, OpenShards
from stamo_dist.data.sources import open_camera, open_source
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import SourceConfig


def test_every_column_equals_what_streaming_reads(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "s")
    camera = open_camera(open_source(str(folder)), "train", "front")
    assert len(camera.shards) > 1
    opened = OpenShards(camera.shards, limit=1)
    for number, spec in enumerate(camera.shards):
        theirs = camera.reader(number)
        for i in range(spec.samples):
            ours, stock = opened[number].sample(i), theirs[i]
            assert ours.keys() == stock.keys()
            for key, value in stock.items():
                np.testing.assert_array_equal(ours[key], value)
            assert bytes(opened[number].bytes(i, "image")) == stock["image"]
    with pytest.raises(DataError, match="no column 'depth'"):
        opened[0].bytes(0, "depth")


def test_a_damaged_header_or_sample_is_noticed(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "s")
    spec = open_camera(open_source(str(folder)), "train", "front").shards[0]
    path = Path(spec.path)
    whole = path.read_bytes()
    begin = int(np.frombuffer(whole, np.uint32, 2, 4)[1])
    for at, message in ((0, "header does not match"), (8, "table of samples"), (begin, "sample 1: the sizes")):
        path.write_bytes(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
        with pytest.raises(DataError, match=message):
            MappedShard(spec).bytes(1, "image")
    path.write_bytes(whole)
    MappedShard(spec).bytes(1, "image")


def test_packed_shards_are_unpacked_in_the_cache_by_one_of_many(tmp_path: Path) -> None:
    raw = write_source(tmp_path / "raw" / "s")
    packed = write_source(tmp_path / "packed" / "s", compression="zstd", hashes=["sha1"])
    before = sorted(path.name for path in packed.rglob("*"))

    def mixture(folder: Path) -> Mixture:
        data = make_data({"s": SourceConfig(path=str(folder))}, cache=str(tmp_path / "cache"))
        return Mixture(data, seed=0, global_batch=4)

    loaders = [
        build_loader(m, rank=r, world_size=2, cursor=Cursor(), workers=1)
        for m in (mixture(raw), mixture(packed))
        for r in (0, 1)
    ]
    batches = []
    for loader in loaders:
        with closing(loader):
            batches.append([(b.sample.tolist(), b.images.clone()) for b in islice(loader, 10)])
    for plain, unpacked in ((batches[0], batches[2]), (batches[1], batches[3])):
        for (samples, images), (same_samples, same_images) in zip(plain, unpacked, strict=True):
            assert samples == same_samples
            assert bool((images == same_images).all())
    assert sorted(path.name for path in packed.rglob("*")) == before, "the source's folder may be read-only"


def test_a_damaged_packed_shard_is_named(tmp_path: Path) -> None:
    packed = write_source(tmp_path / "s", compression="zstd", hashes=["sha1"])
    shard = sorted((packed / "train" / "front").glob("*.zstd"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    data = make_data({"s": SourceConfig(path=str(packed))}, cache=str(tmp_path / "cache"))
    loader = build_loader(Mixture(data, seed=0, global_batch=4), rank=0, world_size=1, cursor=Cursor())
    with pytest.raises(DataError, match=r"shard\.00001\.mds cannot be had: Checksum failure"):
        list(islice(loader, 10))


def test_workers_import_neither_torch_nor_streaming() -> None:
    code = (
        "import sys, numpy, stamo_dist.data.worker, stamo_dist.data.transforms as t; "
        "changed = t.augmentation(preset=None, crop=1, brightness=0.1, contrast=0.1, seed=0); "
        "changed(numpy.zeros((8, 8, 3), 'u1'), 0, 0); "
        "print([m for m in ('torch', 'streaming', 'pydantic') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
