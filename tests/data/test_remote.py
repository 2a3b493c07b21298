"""Shards behind S3: the same batches, a bounded cache, bad lines, and servers that say no."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from made import make_data, write_source
from s3 import bad_line, far_line, free_port, server, use

from stamo_dist.data import fetch, sources
from stamo_dist.data.cache import Cache, hold
from stamo_dist.data.frames import Episodes
from stamo_dist.data.loader import Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.schema import MANIFEST, Size, Split, first_entries, read_manifest
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import SourceConfig
from stamo_dist.recipe.sampling import Shuffle

pytest.importorskip("moto.server", reason="needs the [dev] extra: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with server(free_port()) as url:
        yield url


@pytest.fixture
def folder(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source on local disk, which lies as s3://robots/s too."""
    import boto3

    folder = write_source(tmp_path / "s", lengths=(20, 20, 20, 20))
    use(monkeypatch, s3)
    store = boto3.client("s3", endpoint_url=s3)
    store.create_bucket(Bucket="robots")
    upload(store, folder, "s")
    return folder


def upload(store: Any, folder: Path, name: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload_file(str(path), "robots", f"{name}/{path.relative_to(folder)}")


def batches(path: str, cache: Path, n: int = 24, **options: Any) -> list[tuple[list[int], bytes]]:
    data = make_data({"s": SourceConfig(path=path)}, cache=str(cache), **options)
    mixture = Mixture(data, seed=0, global_batch=4)
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=1)
    with closing(loader):
        return [(b.sample.tolist(), b.images.numpy().tobytes()) for b in islice(loader, n)]


def test_shards_are_streamed_from_s3(folder: Path, tmp_path: Path) -> None:
    assert batches("s3://robots/s", tmp_path / "cache") == batches(str(folder), tmp_path / "none")
    episodes = Episodes("s3://robots/s", "train", cache=str(tmp_path / "cache"))
    assert (episodes.frames(1, [3]) == Episodes(str(folder), "train").frames(1, [3])).all()
    with pytest.raises(DataError, match=r"s3://robots/nothing/manifest.json: cannot be read"):
        Mixture(make_data({"s": SourceConfig(path="s3://robots/nothing")}, cache=str(tmp_path)), seed=0, global_batch=4)


def test_a_small_cache_gives_the_same_batches(folder: Path, s3: str, tmp_path: Path) -> None:
    import boto3

    folder = write_source(tmp_path / "many", lengths=(12,) * 10)
    upload(boto3.client("s3", endpoint_url=s3), folder, "many")
    sizes = [path.stat().st_size for path in folder.rglob("shard.*.mds")]
    limit = 5 * max(sizes)
    assert sum(sizes) > 9 * max(sizes)
    in_order = {"shuffle": Shuffle(enabled=False), "fetch_ahead": 3}
    expected = batches(str(folder), tmp_path / "none", n=60, **in_order)
    cache = tmp_path / "cache"
    assert batches("s3://robots/many", cache, n=60, cache_limit=limit / 1e9, **in_order) == expected
    Cache(cache, limit).trim()
    assert sum(path.stat().st_size for path in cache.rglob("shard.*.mds")) <= limit


def test_the_shards_used_longest_ago_go_first_and_those_in_use_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for i, age in enumerate((4000, 9000, 2000, 10, 5000)):
        path = tmp_path / "s" / f"shard.{i:05}.mds"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (now - age, now - age))
    in_use = hold(str(tmp_path / "s" / "shard.00003.mds"))
    assert in_use is not None
    Cache(tmp_path, 300).trim()
    assert sorted(p.name for p in tmp_path.rglob("*.mds")) == [f"shard.{i:05}.mds" for i in (0, 2, 3)]
    with caplog.at_level(logging.WARNING):
        cache = Cache(tmp_path, 50)
        cache.trim()
        monkeypatch.setattr("stamo_dist.data.cache._PATIENCE", 0.0)
        with cache.reserve(tmp_path / "s" / "shard.00009.mds", 20, must=False) as scratch:
            assert scratch is None
        assert not caplog.text
        with cache.reserve(tmp_path / "s" / "shard.00009.mds", 20, must=True) as scratch:
            assert scratch is not None
    assert [p.name for p in tmp_path.rglob("*.mds")] == ["shard.00003.mds"]
    assert "raise data.cache_limit" in caplog.text
    in_use.close()
    cache.trim()
    assert not list(tmp_path.rglob("*.mds"))


def test_a_bad_line_is_tried_again(
    folder: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = batches(str(folder), tmp_path / "none")
    Mixture(make_data({"s": SourceConfig(path="s3://robots/s")}, cache=str(tmp_path / "c")), seed=0, global_batch=4)
    monkeypatch.setattr(sources, "_PAUSE", 0.01)

    with bad_line(int(s3.rsplit(":", 1)[1]), cuts=40) as line:
        use(monkeypatch, line)
        assert batches("s3://robots/s", tmp_path / "c") == expected


def test_a_server_that_says_no_and_a_corrupt_object_are_named_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, s3: str
) -> None:
    import boto3

    data = make_data({"s": SourceConfig(path="s3://robots/s")}, cache=str(tmp_path / "cache"))
    mixture = Mixture(data, seed=0, global_batch=4)
    store = boto3.client("s3", endpoint_url=s3)
    store.delete_object(Bucket="robots", Key="s/train/front/shard.00000.mds")
    with pytest.raises(DataError, match=r"s3://robots/s/train/front: shard shard\.00000\.mds cannot be had"):
        mixture.prepare(0)
    assert "trying again" not in caplog.text
    monkeypatch.setattr(sources, "_PAUSE", 0.01)
    content = bytearray((folder / "train" / "front" / "shard.00001.mds").read_bytes())
    content[700] ^= 1
    store.put_object(Bucket="robots", Key="s/train/front/shard.00001.mds", Body=bytes(content))
    with pytest.raises(DataError, match=r"shard\.00001\.mds cannot be had: .*[Cc]hecksum"):
        mixture.prepare(1)
    assert not Path(mixture.shards[1].path).exists()
    with server(free_port(), INITIAL_NO_AUTH_ACTION_COUNT="0") as strict:
        use(monkeypatch, strict)
        with pytest.raises(DataError, match=r"data\.sources\.s: s3://robots/s/manifest\.json: cannot be read: .*403"):
            Mixture(data.model_copy(update={"cache": str(tmp_path / "other")}), seed=0, global_batch=4)


def test_a_source_that_grows_keeps_its_cache(folder: Path, s3: str, tmp_path: Path) -> None:
    """What was fetched, and what was computed of it, lies beside the new shards."""
    import boto3

    store, cache, url = boto3.client("s3", endpoint_url=s3), tmp_path / "cache", "s3://robots/s"
    whole = {name: (folder / name).read_text() for name in (MANIFEST, "train/episodes.jsonl", "train/front/index.json")}
    full = read_manifest(folder)
    before = full.model_copy(update={"splits": {"train": Split(episodes=2, frames=40)}})
    after = full.model_copy(update={"before": [Size(splits=before.splits, digest=before.digest)]})
    index = json.loads(whole["train/front/index.json"])
    old = {
        MANIFEST: before.model_dump_json(),
        "train/episodes.jsonl": "".join(whole["train/episodes.jsonl"].splitlines(keepends=True)[:2]),
        "train/front/index.json": json.dumps({**index, "shards": first_entries(index["shards"], 40)}),
    }
    data = make_data({"s": SourceConfig(path=url)}, cache=str(cache))
    for name, text in old.items():
        store.put_object(Bucket="robots", Key=f"s/{name}", Body=text.encode())
    batches(url, cache)
    was = Mixture(data, seed=0, global_batch=4).fingerprint
    fetched = {p: p.stat().st_ino for p in cache.rglob("*.mds")}
    assert len(Episodes(url, "train", cache=str(cache))) == 2
    for name, text in {**whole, MANIFEST: after.model_dump_json()}.items():
        store.put_object(Bucket="robots", Key=f"s/{name}", Body=text.encode())
    assert batches(url, cache) == batches(str(folder), tmp_path / "none")
    assert len(Episodes(url, "train", cache=str(cache))) == 4
    assert {p: p.stat().st_ino for p in fetched} == fetched
    assert Mixture(data, seed=0, global_batch=4, growth={"s": [0]}).fingerprint == was


def test_a_far_store_is_asked_for_several_shards_at_once_before_they_are_needed(
    folder: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    upload(boto3.client("s3", endpoint_url=s3), write_source(tmp_path / "far", lengths=(12,) * 24), "far")
    in_order = {"shuffle": Shuffle(enabled=False), "fetch_ahead": 8}
    monkeypatch.setattr(fetch, "_AHEAD_BATCHES", 8)
    with far_line(int(s3.rsplit(":", 1)[1]), latency=0.1, rate=50e6) as (line, traffic):
        use(monkeypatch, line)
        data = make_data({"s": SourceConfig(path="s3://robots/far")}, cache=str(tmp_path / "c"), **in_order)
        mixture = Mixture(data, seed=0, global_batch=12)
        loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=1)
        with closing(loader):
            next(loader)
            deadline = time.monotonic() + 60
            while len(list((tmp_path / "c").glob("*/train/front/shard.*.mds"))) < 9 and time.monotonic() < deadline:
                time.sleep(0.05)  # nobody asks for a batch
            assert traffic.most_busy >= 4
            asked = traffic.requests
            for _ in range(6):
                next(loader)
            assert traffic.requests - asked < 6 * 8, "no more than what came into sight"


def test_a_source_that_grows_or_is_removed_leaves_a_running_training_as_it_was(
    folder: Path, s3: str, tmp_path: Path
) -> None:
    """The manifest and the index read at the start stay valid, whatever another training makes of the same cache."""
    import boto3

    store, cache, url = boto3.client("s3", endpoint_url=s3), tmp_path / "cache", "s3://robots/s"
    whole = {
        name: (folder / name).read_bytes() for name in (MANIFEST, "train/episodes.jsonl", "train/front/index.json")
    }
    full = read_manifest(folder)
    before = full.model_copy(update={"splits": {"train": Split(episodes=2, frames=40)}})
    after = full.model_copy(update={"before": [Size(splits=before.splits, digest=before.digest)]})
    index = json.loads(whole["train/front/index.json"])
    old = {
        MANIFEST: before.model_dump_json().encode(),
        "train/episodes.jsonl": b"".join(whole["train/episodes.jsonl"].splitlines(keepends=True)[:2]),
        "train/front/index.json": json.dumps({**index, "shards": first_entries(index["shards"], 40)}).encode(),
    }
    for name, content in old.items():
        store.put_object(Bucket="robots", Key=f"s/{name}", Body=content)
    expected = batches(url, tmp_path / "undisturbed", n=40)

    data = make_data({"s": SourceConfig(path=url)}, cache=str(cache))
    mixture = Mixture(data, seed=0, global_batch=4)
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=1)
    with closing(loader):
        found = [next(loader) for _ in range(5)]
        for name, content in {**whole, MANIFEST: after.model_dump_json().encode()}.items():
            store.put_object(Bucket="robots", Key=f"s/{name}", Body=content)
        assert Mixture(data, seed=0, global_batch=4).num_samples == 80  # refreshes the cache's index
        for path in mixture.shards:
            os.unlink(path.path)  # as for want of room
        found += [next(loader) for _ in range(15)]
        for number in range(len(mixture.shards)):
            mixture.prepare(number)
        for item in store.list_objects_v2(Bucket="robots", Prefix="s/")["Contents"]:
            store.delete_object(Bucket="robots", Key=item["Key"])
        found += [next(loader) for _ in range(20)]
    assert [(b.sample.tolist(), b.images.numpy().tobytes()) for b in found] == expected
    with pytest.raises(DataError, match=r"s3://robots/s/manifest\.json: cannot be read"):
        Mixture(data, seed=0, global_batch=4)
    os.unlink(mixture.shards[0].path)
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=0)
    with (
        closing(loader),
        pytest.raises(DataError, match=r"s3://robots/s/train/front: shard shard\.00000\.mds cannot be had"),
    ):
        [next(loader) for _ in range(20)]
