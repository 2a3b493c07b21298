"""Pairs and chunks: the target frame, the actions between, and what happens at the end of an episode."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from made import colour, make_data, write_source

from stamo_dist.data.loader import Batch, Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.shards import OpenShards
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import Data, SourceConfig

H = 4


def batches(mixture: Mixture, n: int, workers: int = 0) -> list[Batch]:
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=workers)
    with closing(loader):
        return list(islice(loader, n))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_chunk_holds_what_follows_its_frame(two: Callable[..., Data], workers: int) -> None:
    data = two(horizon=H)
    data = data.model_copy(
        update={"sources": {**data.sources, "b": data.sources["b"].model_copy(update={"horizon": 2})}}
    )
    mixture = Mixture(data, seed=0, global_batch=8)
    shards = OpenShards(mixture.shards)
    ends = 0
    for batch in batches(mixture, 20, workers):
        assert batch.target is not None and batch.actions is not None  # noqa: PT018
        assert batch.mask is not None and batch.ahead is not None and batch.proprio is not None  # noqa: PT018
        assert batch.actions.shape == (8, H, 2)
        for k, sample in enumerate(batch.sample.tolist()):
            number = int(mixture.shard_of(np.array(sample)))
            row = shards[number].sample(sample - int(mixture.first[number]))
            episode, t, length = int(row["episode"].split("-")[1]), row["t"], row["length"]
            horizon = H if row["source"] == "a" else 2
            ahead = min(horizon, length - 1 - t)
            ends += ahead < horizon
            assert batch.ahead[k] == ahead
            expected = colour(row["source"], row["camera"], episode, t + ahead).astype(int)
            assert np.abs(batch.target[k].numpy().astype(int) - expected).max() <= 3
            there = min(horizon, length - t)
            assert batch.mask[k].tolist() == [j < there for j in range(H)]
            assert batch.actions[k].tolist() == [[episode, t + j] if j < there else [0, 0] for j in range(H)]
            assert batch.proprio[k].tolist() == [t]
    assert ends > 10, "episode ends were met"


def test_without_a_target_only_the_actions_are_read(two: Callable[..., Data]) -> None:
    (batch,) = batches(Mixture(two(horizon=H, target=False), seed=0, global_batch=8), 1)
    assert batch.target is None
    assert batch.actions is not None
    (frames,) = batches(Mixture(two(), seed=0, global_batch=8), 1)
    assert frames.actions is None
    assert frames.proprio is None


def test_the_same_window_on_any_number_of_workers_and_in_micro_batches(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(horizon=H), seed=0, global_batch=8)
    for alone, helped in zip(batches(mixture, 12), batches(mixture, 12, 2), strict=True):
        for name in ("images", "target", "actions", "mask", "proprio", "ahead"):
            assert torch.equal(getattr(alone, name), getattr(helped, name))
        parts = alone.split(3)
        assert torch.equal(torch.cat([p.target for p in parts if p.target is not None]), alone.target)


def test_action_free_sources_are_masked_and_other_action_spaces_refused(tmp_path: Path) -> None:
    robot = write_source(tmp_path / "robot")
    video = write_source(tmp_path / "video", actions=0)
    other = write_source(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "convention": "joint velocities"}))
    sources = {p.name: SourceConfig(path=str(p)) for p in (robot, video)}
    mixture = Mixture(make_data(sources, horizon=H), seed=0, global_batch=8)
    for batch in batches(mixture, 5):
        assert batch.mask is not None
        assert batch.mask.any(1).tolist() == [mixture.sources[s] == "robot" for s in batch.source]
    sources["other"] = SourceConfig(path=str(other))
    with pytest.raises(DataError, match=r"robot: 2 numbers, made here; other: 2 numbers, joint velocities.*--action"):
        Mixture(make_data(sources, horizon=H), seed=0, global_batch=8)
    assert Mixture(make_data(sources), seed=0, global_batch=8).window is None, "single frames may be mixed"


def test_bad_samples_are_replaced_and_counted_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_source(tmp_path / "toys", lengths=(20, 20))
    shard = folder / "train" / "front" / "shard.00001.mds"
    content = bytearray(shard.read_bytes())
    at = content.index(b"\xff\xd8", np.frombuffer(content, np.uint32, 3, 4)[2])
    content[at : at + 60] = bytes(60)
    shard.write_bytes(content)
    data = make_data({"toys": SourceConfig(path=str(folder))}, on_bad_sample="skip")
    mixture = Mixture(data, seed=0, global_batch=4)
    whole = batches(mixture, 10)
    assert sum(int(batch.replaced.sum()) for batch in whole) == 1
    assert f"skipped: source toys: {shard}: sample 2 (episode toys-" in caplog.text
    helped = batches(mixture, 10, workers=2)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, helped, strict=True)), "the same stand-in"
    os.truncate(shard, 100)
    skipped = sum(int(batch.replaced.sum()) for batch in batches(mixture, 10))
    assert skipped == mixture.shards[1].samples, "a lost shard: frames of another stand in"


def test_a_stuck_shard_is_named(two: Callable[..., Data], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from stamo_dist.data import pool

    monkeypatch.setattr(pool, "_PATIENCE", 0.3)
    folder = write_source(tmp_path / "toys", lengths=(20, 20))
    data = make_data({"toys": SourceConfig(path=str(folder))}, timeout=0.5, workers=1)
    mixture = Mixture(data, seed=0, global_batch=4)
    shard = folder / "train" / "front" / "shard.00000.mds"
    shard.unlink()
    os.mkfifo(shard)  # opening it blocks, as a dead network file system does
    with pytest.raises(DataError, match=r"no batch for .*data\.timeout.*source toys, .*shard\.00000\.mds"):
        batches(mixture, 10, workers=1)
