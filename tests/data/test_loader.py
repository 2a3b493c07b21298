"""Batches: their content, position, augmentation, and what happens when something breaks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import colour, make_data, write_source

from stamo_dist.data.loader import Batch, Cursor, Loader, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.prefetcher import Prefetcher
from stamo_dist.data.shards import OpenShards
from stamo_dist.data.transforms import Augmentation
from stamo_dist.errors import DataError, RunError
from stamo_dist.recipe.data import Data, SourceConfig
from stamo_dist.recipe.sampling import Augment


def alone(mixture: Mixture, cursor: Cursor | None = None, **options: Any) -> Loader:
    return build_loader(mixture, rank=0, world_size=1, cursor=cursor or Cursor(), **options)


def take(loader: Loader, n: int) -> list[Batch]:
    with closing(loader):
        return list(islice(loader, n))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.sample, b.sample) and a.cursor == b.cursor
        for a, b in zip(left, right, strict=True)
    )


def test_a_batch_holds_the_frames_it_names(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(), seed=0, global_batch=8)
    shards = OpenShards(mixture.shards)
    for batch in take(alone(mixture, workers=2), 20):
        assert batch.images.shape == (8, 32, 32, 3)
        assert batch.images.dtype == torch.uint8
        for image, sample, source in zip(batch.images, batch.sample, batch.source, strict=True):
            number = int(mixture.shard_of(sample.numpy()))
            row = shards[number].sample(int(sample) - int(mixture.first[number]))
            assert mixture.sources[source] == row["source"]
            episode = int(row["episode"].split("-")[1])
            expected = colour(row["source"], row["camera"], episode, row["t"]).astype(int)
            assert np.abs(image.numpy().astype(int) - expected).max() <= 3


def test_workers_and_restarts_change_nothing(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(), seed=0, global_batch=8)
    per_epoch = mixture.num_samples // 8
    n = per_epoch + 6
    whole = take(alone(mixture), n)
    assert [b.cursor for b in whole] == [Cursor(8 * k) for k in range(1, n + 1)]
    assert same(take(alone(mixture, workers=2), n), whole)
    for workers in (0, 2):
        for stop in (3, per_epoch, per_epoch + 2):
            # Workers have read ahead of the batch whose cursor is kept.
            cursor = take(alone(mixture, workers=workers), stop)[-1].cursor
            assert same(take(alone(mixture, cursor, workers=workers), n - stop), whole[stop:])


def test_augmentation_follows_seed_pass_and_sample(two: Callable[..., Data]) -> None:
    def some(seed: int, workers: int, cursor: Cursor, n: int) -> list[Batch]:
        mixture = Mixture(two(augment=Augment(crop=0.7, brightness=0.3, contrast=0.3)), seed=seed, global_batch=8)
        return take(alone(mixture, cursor, workers=workers), n)

    whole = some(0, 0, Cursor(), 24)
    assert same(some(0, 1, Cursor(80), 14), whole[10:])
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in whole:
        for sample, image in zip(batch.sample.tolist(), batch.images, strict=True):
            seen.setdefault(sample, []).append(image)
    again = [images for images in seen.values() if len(images) > 1]
    assert sum(not torch.equal(images[0], images[-1]) for images in again) > len(again) / 2, "passes differ"


def test_augmentation_stays_within_its_limits() -> None:
    ramp = np.linspace(80, 160, 64).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    factors, spreads, widths = [], [], []
    for sample in range(200):
        brighter, starker, cropped = ramp.copy(), ramp.copy(), ramp.copy()
        Augmentation(1, 0.3, 0, seed=1)(brighter, 0, sample)
        Augmentation(1, 0, 0.4, seed=1)(starker, 0, sample)
        Augmentation(0.5, 0, 0, seed=1)(cropped, 0, sample)
        factors.append(brighter.mean() / ramp.mean())
        spreads.append(starker.std() / ramp.std())
        widths.append(np.ptp(cropped.astype(int)) / 80)
        assert abs(starker.mean() - ramp.mean()) < 1
        assert cropped.min() >= 80
        assert cropped.max() <= 160
    for values, low, high in ((factors, 0.7, 1.3), (spreads, 0.6, 1.4), (widths, 0.5, 1.0)):
        assert low - 0.03 < min(values) < low + 0.1
        assert high - 0.1 < max(values) < high + 0.03


def test_held_batches_are_never_overwritten(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(), seed=0, global_batch=8)
    for workers in (0, 1):
        loader = alone(mixture, workers=workers)
        held = list(islice(loader, 25))
        loader.close()
        assert same(held, take(alone(mixture, workers=0), 25))


def test_micro_batches_and_devices(two: Callable[..., Data]) -> None:
    (batch,) = take(alone(Mixture(two(), seed=0, global_batch=10)), 1)
    parts = batch.to("cpu").split(4)
    assert [len(p) for p in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([p.images for p in parts]), batch.images)
    assert torch.equal(torch.cat([p.sample for p in parts]), batch.sample)


def test_a_corrupt_frame_is_named_and_ends_the_run(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "toys", lengths=(20, 20))
    shard = folder / "train" / "front" / "shard.00001.mds"
    content = bytearray(shard.read_bytes())
    third = np.frombuffer(content, np.uint32, 3, 4)[2]
    at = content.index(b"\xff\xd8", third)
    content[at : at + 60] = bytes(60)
    shard.write_bytes(content)
    mixture = Mixture(make_data({"toys": SourceConfig(path=str(folder))}), seed=0, global_batch=4)
    for workers in (0, 2):
        with pytest.raises(DataError) as caught:
            take(alone(mixture, workers=workers), mixture.num_samples // 4)
        for part in ("source toys", str(shard), "sample 2", "episode toys-"):
            assert part in str(caught.value)


def test_a_shard_that_changes_under_the_run_is_named(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "toys", lengths=(20, 20))
    mixture = Mixture(make_data({"toys": SourceConfig(path=str(folder))}), seed=0, global_batch=4)
    shard = folder / "train" / "front" / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard\.00001\.mds: \d+ bytes, but index\.json says"):
        take(alone(mixture, workers=1), mixture.num_samples // 4)


def test_a_dead_worker_ends_the_run_at_once(two: Callable[..., Data]) -> None:
    loader = alone(Mixture(two(), seed=0, global_batch=8), workers=2)
    next(loader)
    assert loader._pool is not None
    os.kill(loader._pool._workers[1].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RunError, match="killed, most likely for want of memory"):
        list(islice(loader, 20))
    assert time.monotonic() - began < 4


def test_a_slow_worker_gets_fewer_batches(two: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others take over what it does not get to, and the order stays."""
    mixture = Mixture(two(prefetch=4), seed=0, global_batch=8)
    loader, given = alone(mixture, workers=2), list[int]()
    pool = loader._pool
    assert pool is not None
    slow = pool._workers[1].pid
    os.kill(slow, signal.SIGSTOP)
    send = pool._send
    monkeypatch.setattr(pool, "_send", lambda worker, message: (given.append(worker), send(worker, message)))
    woken = threading.Timer(1, os.kill, (slow, signal.SIGCONT))
    woken.start()
    batches = take(loader, 20)
    woken.join()
    assert given[:8] == [0, 1] * 4
    assert given[8:10] == [0, 0], "once for the batch that came, once while the other's was waited for"
    assert same(batches, take(alone(mixture), 20))


def test_workers_survive_the_signals_of_a_cluster_and_end_with_the_run(two: Callable[..., Data]) -> None:
    loader = alone(Mixture(two(), seed=0, global_batch=8), workers=2)
    assert loader._pool is not None
    pids = [worker.pid for worker in loader._pool._workers]
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
    assert len(list(islice(loader, 10))) == 10
    loader.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(RunError, match="closed"):
        next(loader)


def test_reading_ahead_keeps_order_and_errors(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(), seed=0, global_batch=8)
    expected = take(alone(mixture), 10)
    loader = alone(mixture)
    left = iter(range(10))

    def read() -> Batch:
        if next(left, None) is None:
            raise DataError("gone")
        return next(loader)

    ahead = Prefetcher(read)
    assert same([ahead.take() for _ in range(10)], expected)
    with pytest.raises(DataError, match="gone"):
        ahead.take()
    full = Prefetcher(lambda: expected[0])
    full.close()
    assert not full._thread.is_alive()


KILLED = """
import sys, time
from made import make_data
from stamo_dist.data.loader import Cursor, build_loader
from stamo_dist.data.prefetcher import Prefetcher
from stamo_dist.data.mixture import Mixture
from stamo_dist.recipe.data import SourceConfig

mixture = Mixture(make_data({"s": SourceConfig(path=sys.argv[1])}), seed=0, global_batch=8)
loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=2)
next(loader)
print(*[w.pid for w in loader._pool._workers], flush=True)
time.sleep(60)
"""


def test_no_worker_and_no_shared_memory_outlives_a_killed_run(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "toys")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True, env=env)
    assert run.stdout is not None
    pids = run.stdout.readline().split()
    assert len(pids) == 2
    for pid in (run.pid, *pids):
        assert "/dev/shm/" not in Path(f"/proc/{pid}/maps").read_text()
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not list((tmp_path / "tmp").iterdir())
