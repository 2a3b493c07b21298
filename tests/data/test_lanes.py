"""The order of lanes: exact passes and shares, any part of it by itself, and each node with its own shards."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stamo_dist.data.allocation import Allocation
from stamo_dist.data.lane_order import LaneOrder
from stamo_dist.data.permute import mixed, permuted

Shards = list[tuple[NDArray[np.int64], NDArray[np.int64]]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 10, 97, 1000, 4096])
def test_a_permutation_gives_every_number_once(size: int) -> None:
    for key in mixed(np.arange(5), size):
        found = permuted(np.arange(size), np.full(size, size), np.full(size, key))
        assert sorted(found.tolist()) == list(range(size))


def test_permutations_are_as_good_as_random_ones() -> None:
    keys = mixed(np.arange(12_000))
    rows = np.stack([permuted(np.full(12_000, i), np.full(12_000, 6), keys) for i in range(6)], axis=1)
    where = np.stack([(rows == number).sum(0) for number in range(6)])
    assert np.abs(where / 2000 - 1).max() < 0.15, "each number is about as often at each place"
    assert len(np.unique(rows, axis=0)) == 720, "every permutation of six comes up"


def sources(rng: np.random.Generator) -> Shards:
    """A few sources of a few unequal shards."""
    shards, start = [], 0
    for _ in range(rng.integers(1, 8)):
        counts = rng.integers(1, 60, rng.integers(1, 30)).astype(np.int64)
        shards.append((start + counts.cumsum() - counts, counts))
        start += int(counts.sum())
    return shards


def mix(rng: np.random.Generator, shards: Shards, batch: int) -> Allocation:
    """Weights that change, and limits on some sources."""
    weights = [
        {0: float(rng.random() ** 3 + 0.001)}
        | {int(rng.integers(1, 60)): float(rng.random()) for _ in range(rng.integers(0, 4))}
        for _ in shards
    ]
    limits = [float(rng.integers(1, 3 * counts.sum() + 2)) if rng.random() < 0.5 else np.inf for _, counts in shards]
    return Allocation(weights, limits, batch)


@pytest.mark.parametrize("seed", range(40))
def test_every_pass_has_every_sample_once_whatever_the_weights_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards, batch = sources(rng), int(rng.integers(1, 60))
    allocation = mix(rng, shards, batch)
    order = LaneOrder(allocation, shards, batch, int(rng.integers(1, 70)), seed)
    count = int(min(allocation.end / batch, 200))
    plan = order.plan(0, count)
    assert plan.samples.shape == (count, batch)
    for s, (first, counts) in enumerate(shards):
        mine = (plan.samples >= first[0]) & (plan.samples < first[0] + counts.sum())
        assert mine.sum() == allocation.counts(count * batch)[s]
        for number in range(int(plan.epochs[mine].max(initial=-1)) + 1):
            found = plan.samples[mine & (plan.epochs == number)]
            assert len(np.unique(found)) == len(found)
            if (plan.epochs[mine] > number).any():
                assert len(found) == counts.sum(), "a pass is over before the next begins"
    fresh = LaneOrder(allocation, shards, batch, order.lanes, seed)
    for _ in range(4):
        begin = int(rng.integers(0, count + 1))
        n = int(min(rng.integers(0, 20), count - begin))
        slots = np.sort(rng.choice(batch, rng.integers(1, batch + 1), replace=False))
        part = fresh.plan(begin, n, slots)
        assert (part.samples == plan.samples[begin : begin + n][:, slots]).all()
        assert (part.epochs == plan.epochs[begin : begin + n][:, slots]).all()


@pytest.mark.parametrize("seed", range(40))
def test_shares_are_within_two_samples_and_limits_are_met_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, batch = int(rng.integers(1, 30)), int(rng.integers(1, 200))
    weights = rng.random(n) ** 4 + 1e-4
    free = Allocation([{0: float(w)} for w in weights], [np.inf] * n, batch)
    at = np.arange(0, 3000, 7)
    counts = np.array([free.counts(int(t) * batch) for t in at])
    assert np.abs(counts - np.outer(at * batch, weights / weights.sum())).max() < 2
    limits = rng.integers(1, 4000, n).astype(float)
    capped = Allocation([{0: float(w)} for w in weights], limits.tolist(), batch)
    whole = capped.counts(10**9)
    assert (whole <= limits).all()
    assert limits.sum() - whole.sum() < batch, "less than a batch is left over"
    assert whole.sum() == capped.end


def test_weights_change_at_their_batch() -> None:
    allocation = Allocation([{0: 1, 10: 3}, {0: 1}, {0: 0, 5: 1}], [np.inf] * 3, 12)
    assert np.diff([allocation.counts(12 * t) for t in range(15)], axis=0).tolist() == [
        *[[6, 6, 0]] * 5,
        *[[4, 4, 4]] * 5,
        *[pytest.approx([7.2, 2.4, 2.4], abs=1)] * 4,
    ]


def shards_of(samples: NDArray[np.int64], nodes: int, per_shard: int) -> list[set[int]]:
    """The shards that each node meets."""
    return [set((part // per_shard).ravel().tolist()) for part in np.array_split(samples, nodes, axis=1)]


@pytest.mark.parametrize(("nodes", "most"), [(1, 1.0), (8, 1.03), (64, 1.2)])
def test_a_node_needs_its_own_shards_only(nodes: int, most: float) -> None:
    counts = np.full(400, 128, np.int64)
    order = LaneOrder(Allocation([{0: 1}], [np.inf], 256), [(counts.cumsum() - counts, counts)], 256, 2048, seed=3)
    met = shards_of(order.plan(0, 400 * 128 // 256 * 3).samples, nodes, 128)
    assert len(set().union(*met)) == 400
    assert sum(map(len, met)) / 400 <= most, "over three passes"


def test_a_batch_is_spread_over_the_whole_source() -> None:
    counts = np.full(400, 128, np.int64)
    order = LaneOrder(Allocation([{0: 1}], [np.inf], 256), [(counts.cumsum() - counts, counts)], 256, 2048, seed=3)
    samples = order.plan(0, 200).samples
    drift = samples / counts.sum()
    assert drift.mean(1).var() < 1.5 * drift.var() / 256
    assert np.mean([len(np.unique(row // 128)) for row in samples]) > 150
    orders = [
        np.argsort(
            np.argsort(
                LaneOrder(Allocation([{0: 1}], [np.inf], 256), [(counts.cumsum() - counts, counts)], 256, 2048, seed)
                .plan(0, 200)
                .samples.ravel()
            )
        )
        for seed in (3, 4)
    ]
    assert abs(np.corrcoef(*orders)[0, 1]) < 0.1, "another seed is another order"


def test_the_smallest_shares_are_found_at_once_and_weights_are_relative() -> None:
    counts = np.full(4, 50, np.int64)
    shards = [(start + counts.cumsum() - counts, counts) for start in (0, 200)]
    rare = Allocation([{0: 1.0}, {0: 1e-9}], [np.inf] * 2, 8)
    due = next(batch for batch in (2**n for n in range(40)) if rare.counts(8 * batch)[1])
    low = due // 2
    while due - low > 1:
        low, due = (low, (low + due) // 2) if rare.counts(8 * ((low + due) // 2))[1] else ((low + due) // 2, due)
    assert (LaneOrder(rare, shards, 8, 64, 0).plan(due - 1, 1).samples >= 200).sum() == 1
    for scale in (1e-30, 1.0, 1e300):
        same = Allocation([{0: scale}, {0: 3 * scale}], [np.inf] * 2, 8)
        assert same.counts(800).tolist() == [200, 600]


def test_weights_may_change_with_every_batch_of_a_long_pass() -> None:
    counts = np.full(30, 500, np.int64)
    shards = [(start + counts.cumsum() - counts, counts) for start in (0, 15_000)]
    changes = {step: 1.0 + step % 7 for step in range(1500)}
    order = LaneOrder(Allocation([changes, {0: 2.0}], [np.inf, 15_000], 16), shards, 16, 8, 0)
    forwards = np.concatenate([order.plan(batch, 100).samples for batch in range(0, 1500, 100)])
    _, times = np.unique(forwards, return_counts=True)
    assert times.max() <= 2
    assert len(np.unique(forwards[:900])) == 900 * 16, "within the first pass nothing comes twice"
    assert (order.plan(700, 3).samples == forwards[700:703]).all()
