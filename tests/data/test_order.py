"""The order: streaming's within a source, exact shares between sources, the same on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest

from stamo_dist.data.group_order import SourceOrder
from stamo_dist.data.loader import Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.schedule import Schedule
from stamo_dist.recipe.data import Data, SourceConfig
from stamo_dist.recipe.sampling import Shuffle

COUNTS = np.array([40, 7, 120, 64, 33, 90, 1, 58], np.int64)
FIRST = 1000 + COUNTS.cumsum() - COUNTS


def test_a_source_of_one_group_is_ordered_as_streaming_orders_an_epoch() -> None:
    from streaming.base.shuffle import get_shuffle

    order = SourceOrder(FIRST, COUNTS, Shuffle(block_size=64), seed=3)
    for epoch in range(3):
        samples, epochs = order.at(epoch * order.samples, (epoch + 1) * order.samples)
        assert (samples - 1000).tolist() == get_shuffle("py1e", COUNTS, 1, 3, epoch, 64).tolist()
        assert set(epochs.tolist()) == {epoch}


@pytest.mark.parametrize("algorithm", ["py1e", "py1br", "py1s", "py2s", "naive"])
def test_large_sources_are_shuffled_group_by_group(algorithm: str) -> None:
    order = SourceOrder(FIRST, COUNTS, Shuffle(algorithm=algorithm, block_size=32), seed=1, group=100)
    n = order.samples
    whole, epochs = order.at(0, 3 * n)
    for epoch in range(3):
        of_pass = whole[epoch * n : (epoch + 1) * n]
        assert sorted(of_pass.tolist()) == list(range(1000, 1000 + n)), "every frame once a pass"
        assert (epochs[epoch * n : (epoch + 1) * n] == epoch).all()
    assert whole[:n].tolist() != whole[n : 2 * n].tolist()
    pieces = [order.at(a, b)[0] for a, b in ((0, 1), (1, 250), (250, n + 3), (n + 3, 3 * n))]
    assert np.concatenate(pieces).tolist() == whole.tolist(), "any stretch by itself"
    fresh = SourceOrder(FIRST, COUNTS, Shuffle(algorithm=algorithm, block_size=32), seed=1, group=100)
    assert fresh.at(2 * n + 5, 2 * n + 90)[0].tolist() == whole[2 * n + 5 : 2 * n + 90].tolist()


def sequence(schedule: Schedule, count: int, step: int) -> np.ndarray:
    return np.concatenate([schedule.interval(at, min(step, count - at)).source for at in range(0, count, step)])


def test_shares_are_exact_after_any_number_of_samples() -> None:
    weights = [0.5, 0.3, 0.15, 0.049, 0.001]
    schedule = Schedule([{0: w} for w in weights], [np.inf] * 5)
    source = sequence(schedule, 20_000, 20_000)
    counts = (source[:, None] == np.arange(5)).cumsum(0)
    asked = np.outer(np.arange(1, 20_001), weights)
    assert np.abs(counts - asked).max() < len(weights)
    assert (source == sequence(schedule, 20_000, 77)).all(), "any stretch by itself"
    for at in (0, 1, 999, 12_345):
        assert schedule.counts(at).tolist() == np.bincount(source[:at], minlength=5).tolist()
    begun = schedule.interval(500, 300)
    assert begun.begin.tolist() == counts[499].tolist()
    assert begun.end.tolist() == counts[799].tolist()


def test_shares_change_at_a_step_and_used_up_sources_leave_their_part() -> None:
    schedule = Schedule([{0: 1, 1000: 3}, {0: 1}, {0: 0, 500: 1}], [np.inf, 400, np.inf])
    source = sequence(schedule, 4000, 4000)
    assert (source == sequence(schedule, 4000, 64)).all()
    half = np.bincount(source[:500], minlength=3)
    assert abs(half[0] - 250) <= 1
    assert half[2] == 0
    assert np.bincount(source, minlength=3)[1] == 400, "the limit is met exactly"
    assert (source[2000:] != 1).all()
    late = np.bincount(source[2000:], minlength=3)
    assert abs(late[0] - 1500) <= 2
    assert abs(late[2] - 500) <= 2


def test_data_that_is_limited_ends() -> None:
    schedule = Schedule([{0: 2}, {0: 1}], [37, 50])
    assert schedule.end == 87
    source = sequence(schedule, 100, 9)
    assert np.bincount(source).tolist() == [37, 50]


def global_batches(mixture: Mixture, world: int, cursor: Cursor, n: int) -> list[set[int]]:
    loaders = [build_loader(mixture, rank=r, world_size=world, cursor=cursor) for r in range(world)]
    return [set().union(*(b.sample.tolist() for b in batches)) for batches in islice(zip(*loaders, strict=True), n)]


def test_global_batches_are_the_same_sets_on_any_number_of_processes(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(a=2), seed=0, global_batch=12)
    per_epoch = mixture.num_samples // 12
    whole = global_batches(mixture, 1, Cursor(), 2 * per_epoch)
    assert whole[:per_epoch] != whole[per_epoch:]
    for world in (2, 3, 4):
        assert global_batches(mixture, world, Cursor(), 2 * per_epoch) == whole
    # Stopped on two processes, continued on one, three and four.
    stopped = build_loader(mixture, rank=1, world_size=2, cursor=Cursor())
    cursor = [b.cursor for b in islice(stopped, 5)][-1]
    assert cursor == Cursor(60)
    for world in (1, 3, 4):
        assert global_batches(mixture, world, Cursor.from_dict(cursor.to_dict()), per_epoch) == whole[5 : per_epoch + 5]


def test_every_rank_gets_every_source(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(a=1, b=1), seed=0, global_batch=16)
    for rank in range(4):
        loader = build_loader(mixture, rank=rank, world_size=4, cursor=Cursor())
        sources = np.concatenate([b.source.numpy() for b in islice(loader, 20)])
        assert 0.3 < sources.mean() < 0.7


def test_without_shuffling_sources_are_read_in_stored_order(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(a=0, shuffle=Shuffle(enabled=False)), seed=0, global_batch=8)
    assert mixture.plan(0, 20).samples.reshape(-1).tolist() == [*range(80), *range(80)]


def test_a_run_ends_where_limited_data_ends(two: Callable[..., Data]) -> None:
    sources = {name: SourceConfig(path=s.path, max_epochs=2) for name, s in two().sources.items()}
    mixture = Mixture(two().model_copy(update={"sources": sources}), seed=0, global_batch=8)
    samples = np.concatenate([
        b.sample.numpy() for b in build_loader(mixture, rank=0, world_size=1, cursor=Cursor())
    ])  # fmt: skip
    assert mixture.steps == 2 * mixture.num_samples // 8
    assert np.bincount(samples).max() == 2
    assert len(samples) == mixture.steps * 8
