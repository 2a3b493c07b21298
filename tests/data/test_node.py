"""One rank of a node reads the sources for all of it: once, whatever becomes of the sources, the files and the rank."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import make_data, write_source

from stamo_dist.data import episode_columns, frame_cache, node, opening, sources
from stamo_dist.data.frame_cache import cache_path, write_cache, write_manifests
from stamo_dist.data.instructions import Instructions, episode_tables
from stamo_dist.data.loader import CacheKeys, Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.node import NodeShare
from stamo_dist.data.schema import MANIFEST
from stamo_dist.data.sources import open_source
from stamo_dist.errors import DataError, RunError
from stamo_dist.recipe.data import Data, SourceConfig

RANKS = range(8, 11)  # of the second node


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /dev/shm: the folder of this user."""
    monkeypatch.setattr(node, "PLACES", (str(tmp_path / "shm"), str(tmp_path / "disk")))
    monkeypatch.setattr(node, "LINGER", 0.2)
    for name in ("shm", "disk"):
        (tmp_path / name).mkdir()
    return tmp_path / "shm" / f"stamo-start-{os.getuid()}"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were opened, by any rank."""
    opened, honest = list[str](), opening.open_source

    def counted(path: str, *args: Any) -> Any:
        opened.append(path)
        return honest(path, *args)

    monkeypatch.setattr(opening, "open_source", counted)
    return opened


def mixture(data: Data, share: NodeShare | None) -> Mixture:
    return Mixture(data, seed=0, global_batch=4, node=share)


def in_ranks(make: Callable[[NodeShare], Any], run: str = "run") -> list[Any]:
    """What each rank of a node makes, at once, or what it raises; the first comes last."""
    shares = [NodeShare(run, RANKS, rank) for rank in RANKS]

    def one(share: NodeShare) -> Any:
        try:
            return make(share)
        except Exception as e:
            return e

    with ThreadPoolExecutor(len(shares)) as threads:
        others = [threads.submit(one, share) for share in shares[1:]]
        time.sleep(0.1)
        found = [one(shares[0]), *(other.result() for other in others)]
    for share in shares:
        share.met()
    return found


def batches(found: Mixture, workers: int = 1) -> list[tuple[list[int], bytes]]:
    loader = build_loader(found, rank=0, world_size=1, cursor=Cursor(), workers=workers)
    with closing(loader):
        return [(b.sample.tolist(), b.images.numpy().tobytes()) for b in islice(loader, 6)]


def test_the_sources_are_read_once_and_no_name_stays(tmp_path: Path, place: Path, reads: list[str]) -> None:
    data = make_data({name: SourceConfig(path=str(write_source(tmp_path / name))) for name in "ab"})
    alone = mixture(data, None)
    reads.clear()
    ranks = in_ranks(lambda share: mixture(data, share))
    assert len(reads) == 2
    assert {rank.fingerprint for rank in ranks} == {alone.fingerprint}
    assert all(list(rank.shards) == list(alone.shards) for rank in ranks)
    assert not place.exists()
    assert batches(ranks[2]) == batches(alone, workers=0), "its workers map the same memory"
    assert ranks[2].opened[0][0].manifest.splits == alone.opened[0][0].manifest.splits


def test_what_was_read_at_the_start_stays_valid(tmp_path: Path, place: Path, reads: list[str]) -> None:
    """A source that grows, and then goes, between the ranks of a node."""
    folder = write_source(tmp_path / "s")
    data = make_data({"s": SourceConfig(path=str(folder))})
    shares = [NodeShare("run", RANKS, rank) for rank in RANKS]
    first = mixture(data, shares[0])
    expected = batches(first)
    write_source(tmp_path / "more" / "s", lengths=(7, 12, 5, 9, 8))
    for file in (MANIFEST, "train/front/index.json", "train/episodes.jsonl"):
        shutil.copy(tmp_path / "more" / "s" / file, folder / file)
    second = mixture(data, shares[1])
    assert batches(second) == expected
    (folder / MANIFEST).unlink()
    (folder / "train" / "front" / "index.json").unlink()
    third = mixture(data, shares[2])
    assert batches(third) == expected
    assert len(reads) == 1
    assert first.fingerprint == second.fingerprint == third.fingerprint
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"shard\.0000\d\.mds: No such file"):
        batches(mixture(data, shares[1]), workers=0)
    shares[0].met()


def test_every_rank_says_what_is_wrong(tmp_path: Path, place: Path, reads: list[str]) -> None:
    paths = {"none": tmp_path / "none", "damaged": write_source(tmp_path / "damaged")}
    (paths["damaged"] / "train" / "front" / "shard.00000.mds").unlink()
    data = make_data({name: SourceConfig(path=str(path)) for name, path in paths.items()})
    errors = in_ranks(lambda share: mixture(data, share))
    assert [type(error) for error in errors] == [DataError] * 3
    assert len({str(error) for error in errors}) == 1
    assert str(errors[0]).startswith("2 problems in the data:")
    assert len(reads) == 2
    assert not place.exists()


def test_what_killed_starts_left_is_passed_over_and_removed(tmp_path: Path, place: Path) -> None:
    data = make_data({"s": SourceConfig(path=str(write_source(tmp_path / "s")))})
    code = (
        "import os, signal, sys\n"
        "from stamo_dist.data import node\n"
        "node.PLACES = (sys.argv[1],)\n"
        "share = node.NodeShare('run', range(8, 11), 8)\n"
        "share.once('sources', lambda: ({'sources': 'of a start that was killed'}, {}))\n"
        "share.once('other', lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(place.parent)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(place.iterdir())) == 2
    expected = mixture(data, None).fingerprint
    assert {found.fingerprint for found in in_ranks(lambda share: mixture(data, share))} == {expected}
    assert not place.exists()


def test_two_runs_at_once_do_not_meet(tmp_path: Path, place: Path) -> None:
    data = [make_data({"s": SourceConfig(path=str(write_source(tmp_path / n / "s", lengths=(n_, 9))))})
            for n, n_ in (("a", 5), ("b", 6))]  # fmt: skip
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(in_ranks, lambda share, d=d: mixture(d, share), f"run{i}") for i, d in enumerate(data)]
    for d, run in zip(data, runs, strict=True):
        assert {found.fingerprint for found in run.result()} == {mixture(d, None).fingerprint}


def test_without_shared_memory_the_disk_serves(
    tmp_path: Path, place: Path, caplog: pytest.LogCaptureFixture, reads: list[str]
) -> None:
    place.parent.rmdir()
    data = make_data({"s": SourceConfig(path=str(write_source(tmp_path / "s")))})
    with caplog.at_level(logging.WARNING):
        ranks = in_ranks(lambda share: mixture(data, share))
    assert len({found.fingerprint for found in ranks}) == 1
    assert len(reads) == 1
    assert "what the node reads is shared elsewhere" in caplog.text
    (tmp_path / "disk").rmdir()
    with pytest.raises(RunError, match="cannot be written; make room"):
        mixture(data, NodeShare("run", RANKS, RANKS[0]))


def test_a_first_rank_that_does_not_come_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "PATIENCE", 0.1)
    with pytest.raises(RunError, match=rf"{place}/sources-\w+: rank 8 should write there what it reads"):
        NodeShare("run", RANKS, 9).once("sources", lambda: ({}, {}))


def many_shards(folder: Path, shards: int) -> Path:
    """A source of so many shards of one frame."""
    write_source(folder, lengths=(1,) * shards, shard_bytes=900)
    assert len(list(folder.rglob("shard.*.mds"))) == shards
    return folder


def test_workers_are_told_the_same_whatever_the_number_of_shards(tmp_path: Path, monkeypatch: Any) -> None:
    from stamo_dist.data.reader import ReaderSpec

    sizes, honest = list[int](), ReaderSpec.dumps

    def measured(spec: ReaderSpec) -> bytes:
        sizes.append(len(text := honest(spec)))
        return text

    monkeypatch.setattr(ReaderSpec, "dumps", measured)
    for name, shards in (("few", 10), ("lot", 100)):
        data = make_data({"s": SourceConfig(path=str(many_shards(tmp_path / name / "s", shards)))})
        batches(mixture(data, None))
    assert sizes[1] < sizes[0] + 10


def test_of_many_shards_the_first_and_last_are_looked_at(tmp_path: Path) -> None:
    folder = many_shards(tmp_path / "s", 100)
    data = make_data({"s": SourceConfig(path=str(folder))})
    shards = sorted(folder.rglob("shard.*.mds"))
    shards[50].unlink()
    found = mixture(data, None)
    with pytest.raises(DataError, match=r"shard\.00050\.mds: No such file"):
        found.views[0].open(50)
    shards[99].write_bytes(b"cut")
    with pytest.raises(DataError, match=r"2 of 100 shards are missing or damaged: shard\.00050\.mds \(missing\)"):
        mixture(data, None)


def test_the_fingerprint_is_that_of_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts as in one, whatever a part takes."""
    folder = many_shards(tmp_path / "s", 30)
    (write_source(tmp_path / "t", cameras=("a", "b"), lengths=(9, 8, 7)))
    used = {"s": SourceConfig(path=str(folder)), "t": SourceConfig(path=str(tmp_path / "t"), actions=False)}
    monkeypatch.setattr("stamo_dist.data.shard_table._AT_ONCE", 7)
    found = mixture(make_data(used, horizon=2), None)
    identity = {
        "format": 2,
        "shards": [(shard.digest, shard.samples) for shard in found.shards],
        "sources": found._source_first.tolist(),
        "schedule": found.schedule.identity,
        "shuffle": found.data.shuffle.model_dump(include={"enabled", "order", "lanes"}),
        "horizon": [2, None, None],
        "seed": 0,
        "global_batch": 4,
        "videos": ["t"],
    }
    assert found.fingerprint == sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def test_the_episodes_are_read_once_for_a_node(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data({name: SourceConfig(path=str(write_source(tmp_path / name)), instruction="x") for name in "ab"})
    alone = Instructions(found := mixture(data, None), episode_tables(found))
    read, honest = list[str](), sources.read_columns
    monkeypatch.setattr(sources, "read_columns", lambda *args: read.append(args[1]) or honest(*args))

    def make(share: NodeShare) -> Instructions:
        found = mixture(data, share)
        return Instructions(found, episode_tables(found))

    samples = torch.arange(found.num_samples)
    for instructions in in_ranks(make):
        assert instructions.texts == alone.texts
        assert instructions.of(samples).equal(alone.of(samples))
        assert instructions.labelled(samples).equal(alone.labelled(samples))
    assert read == ["train"] * 2
    assert not place.exists()


def test_columns_of_a_large_table_are_kept_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(episode_columns, "_LARGE", 1)
    folder, cache = write_source(tmp_path / "s"), tmp_path / "cache"
    read, honest = list[str](), sources.read_columns
    monkeypatch.setattr(sources, "read_columns", lambda *args: read.append(args[1]) or honest(*args))

    def lengths() -> list[int]:
        return open_source(str(folder), str(cache)).columns("train").lengths.tolist()

    assert lengths() == lengths() == [7, 12, 5, 9]
    assert len(read) == 1
    table = folder / "train" / "episodes.jsonl"
    table.write_text(table.read_text().replace('"length":7', '"length":6'))
    assert lengths() == [6, 12, 5, 9]
    (kept,) = (cache / "episodes").iterdir()
    for content in (b"", bytes(5000), kept.read_bytes()[:-300]):
        kept.write_bytes(content)
        assert lengths() == [6, 12, 5, 9]
        assert "not readable, so it is made anew" in caplog.text
        caplog.clear()
    assert len(read) == 5
    shutil.rmtree(cache)
    cache.write_text("no folder")
    assert lengths() == [6, 12, 5, 9]
    assert "is read whole at the next start too" in caplog.text


def test_latents_are_looked_for_once_and_a_stale_one_among_many_is_named_when_it_is_read(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, vae = many_shards(tmp_path / "s", 100), "0123456789abcdef" * 4
    data = make_data({"s": SourceConfig(path=str(folder))}, latents="cached")
    found = mixture(data, None)
    for shard in found.shards:
        write_cache(shard, "latents", vae, np.zeros((shard.samples, 4, 2, 2), np.float16), "float16")
    looked, honest = list[str](), frame_cache._read_meta
    monkeypatch.setattr(frame_cache, "_read_meta", lambda shard, *of: looked.append(shard.path) or honest(shard, *of))
    assert found.find_cache("latents", vae).shape == (4, 2, 2)
    assert len(looked) == 102, "without a manifest each is looked at"
    write_manifests(found.shards, "latents", vae, {})
    looked.clear()
    specs = in_ranks(lambda share: mixture(data, share).find_cache("latents", vae))
    assert specs == [found.find_cache("latents", vae)] * 3
    assert [Path(path).name for path in looked] == ["shard.00000.mds", "shard.00099.mds"]

    meta = cache_path(found.shards[50], "latents", vae).with_suffix(".json")
    meta.write_text(meta.read_text().replace(found.shards[50].digest, "of yesterday"))
    loader = build_loader(mixture(data, None), rank=0, world_size=1, cursor=Cursor(), workers=1, caches=CacheKeys(vae))
    with closing(loader), pytest.raises(DataError, match=r"shard\.00050\.npy: stale: the shard has changed since"):
        list(islice(loader, 25))
