"""A global batch that changes at given steps: exact passes and shares, and every position found by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_lanes import Shards, sources

from stamo_dist.data.allocation import Allocation
from stamo_dist.data.lane_order import LaneOrder
from stamo_dist.data.loader import Cursor, build_loader, first_frames
from stamo_dist.data.mixture import Mixture
from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.recipe.data import Data, Shuffle
from stamo_dist.run.state import RunState
from stamo_dist.training.divergence import BadBatches

SIZES = {0: 8, 5: 24, 11: 12}
STEPS = 24
BEGIN = Cursor()
ORDERS = pytest.mark.parametrize("shuffle", [Shuffle(), Shuffle(order="groups"), Shuffle(enabled=False)], ids=str)
WEIGHTS = pytest.mark.parametrize("weights", [2.0, {0: 2, 5: 1}, {0: 1, 4: 3, 13: 1}], ids=["one", "same", "other"])


def random_allocation(rng: np.random.Generator, shards: Shards) -> tuple[Allocation, BatchSizes]:
    """Sizes and weights that change, at the same batches or at others, and limits on some sources."""
    steps = sorted({0, *rng.integers(1, 60, rng.integers(1, 5)).tolist()})
    sizes = BatchSizes.of({at: int(rng.integers(1, 60)) for at in steps})
    changes = [int(rng.choice(steps)), int(rng.integers(1, 60))]
    weights = [{0: float(rng.random() + 0.01)} | {at: float(rng.random()) for at in changes} for _ in shards]
    limits = [float(rng.integers(1, 3 * counts.sum() + 2)) if rng.random() < 0.5 else np.inf for _, counts in shards]
    return Allocation(weights, limits, sizes), sizes


@pytest.mark.parametrize("seed", range(40))
def test_every_pass_has_every_sample_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards = sources(rng)
    allocation, sizes = random_allocation(rng, shards)
    lanes = int(rng.integers(1, 70))
    count = 120 if allocation.end == np.inf else min(120, sizes.batches(int(allocation.end)))
    order = LaneOrder(allocation, shards, sizes, lanes, seed)
    plans = [order.plan(batch, 1) for batch in range(count)]
    assert [plan.samples.shape[1] for plan in plans] == [sizes.at(batch) for batch in range(count)]
    assert len(order.plan(count, 1).samples) == (allocation.end > sizes.before(count))
    samples = np.concatenate([np.empty(0, np.int64), *(plan.samples[0] for plan in plans)])
    epochs = np.concatenate([np.empty(0, np.int32), *(plan.epochs[0] for plan in plans)])
    for s, (first, counts) in enumerate(shards):
        mine = (samples >= first[0]) & (samples < first[0] + counts.sum())
        assert mine.sum() == allocation.counts(sizes.before(count))[s]
        for number in range(int(epochs[mine].max(initial=-1)) + 1):
            found = samples[mine & (epochs == number)]
            assert len(np.unique(found)) == len(found)
            if (epochs[mine] > number).any():
                assert len(found) == counts.sum()
    fresh = LaneOrder(allocation, shards, sizes, lanes, seed)
    for begin in rng.integers(0, max(1, count), 6).tolist():
        part = fresh.plan(begin, 9)
        assert len(part.samples) <= sizes.left(begin, 9)
        for found, plan in zip(part.samples, plans[begin:], strict=False):
            assert (found == plan.samples[0]).all()


def test_shares_are_within_two_samples_and_limits_are_exact() -> None:
    sizes = BatchSizes.of({0: 7, 30: 64, 90: 13})
    weights = np.array([0.61, 0.2, 0.19])
    free = Allocation([{0: w} for w in weights], [np.inf] * 3, sizes)
    at = np.array([sizes.before(batch) for batch in range(0, 300, 7)])
    assert np.abs(np.array([free.counts(int(n)) for n in at]) - np.outer(at, weights)).max() < 2
    limits = [900.0, 700.0, 800.0]
    capped = Allocation([{0: w} for w in weights], limits, sizes)
    whole = capped.counts(10**9)
    assert (whole <= limits).all()
    assert whole.sum() == capped.end > sum(limits) - sizes.at(sizes.batches(int(capped.end)))


def batches(mixture: Mixture, world: int, cursor: Cursor = BEGIN) -> list[set[int]]:
    """The sets of samples of the global batches from a position to the last step."""
    loaders = [build_loader(mixture, rank=r, world_size=world, cursor=cursor) for r in range(world)]
    left = STEPS - mixture.batches.batches(cursor.samples)
    found = []
    for number, shares in enumerate(islice(zip(*loaders, strict=True), left), STEPS - left):
        assert {len(b) for b in shares} == {mixture.batches.at(number) // world}
        assert {b.cursor for b in shares} == {Cursor(mixture.batches.before(number + 1))}
        found.append(set().union(*(b.sample.tolist() for b in shares)))
    for loader in loaders:
        loader.close()
    return found


@ORDERS
@WEIGHTS
def test_the_same_batches_on_any_number_of_processes_from_any_step(
    two: Callable[..., Data], shuffle: Shuffle, weights: float | Mapping[int, float]
) -> None:
    mixture = Mixture(two(a=weights, shuffle=shuffle), seed=0, global_batch=SIZES)
    whole = batches(mixture, 1)
    assert len(whole) == STEPS
    for world in (2, 4):
        assert batches(mixture, world) == whole
    for step in (1, 4, 5, 6, 12):
        cursor = Cursor.from_dict(Cursor(mixture.batches.before(step)).to_dict())
        assert batches(mixture, 2, cursor) == whole[step:]


def test_workers_decode_ahead_over_a_change(two: Callable[..., Data]) -> None:
    """Batches of another size reuse the memory of those before, each with its own frames."""
    mixture = Mixture(two(a={0: 1, 5: 3}, horizon=3), seed=0, global_batch=SIZES)
    with build_loader(mixture, rank=1, world_size=2, cursor=Cursor(), workers=0) as loader:
        alone = list(islice(loader, STEPS))
    cursor = alone[2].cursor
    with build_loader(mixture, rank=1, world_size=2, cursor=cursor, workers=2) as loader:
        ahead = list(islice(loader, STEPS - 3))
    for expected, found in zip(alone[3:], ahead, strict=True):
        for name in ("sample", "images", "target", "actions", "mask", "ahead"):
            assert torch.equal(getattr(expected, name), getattr(found, name)), name
        assert expected.cursor == found.cursor


@ORDERS
def test_what_is_still_to_come_changes_no_earlier_batch(two: Callable[..., Data], shuffle: Shuffle) -> None:
    now = Mixture(two(a={0: 2, 7: 1}, shuffle=shuffle), seed=0, global_batch=SIZES)
    later = Mixture(two(a={0: 2, 7: 1, 14: 5}, shuffle=shuffle), seed=0, global_batch={**SIZES, 13: 4, 20: 40})
    for batch in range(13):
        assert (now.plan(batch, 1).samples == later.plan(batch, 1).samples).all()
    assert now.plan(13, 1).samples.shape != later.plan(13, 1).samples.shape
    assert now.fingerprint != later.fingerprint
    assert later.fingerprint_with({"a": {"0": 2, "7": 1}, "b": 1.0}, {str(at): n for at, n in SIZES.items()}) == (
        now.fingerprint
    )


def test_the_plain_form_is_the_map_with_one_step(two: Callable[..., Data]) -> None:
    plain, same = (Mixture(two(), seed=0, global_batch=batch) for batch in (8, {0: 8, 9: 8}))
    assert plain.fingerprint == same.fingerprint


@ORDERS
def test_max_epochs_ends_the_data_to_the_batch(two: Callable[..., Data], shuffle: Shuffle) -> None:
    data = two(shuffle=shuffle)
    sources = {n: s.model_copy(update={"max_epochs": 2}) for n, s in data.sources.items()}
    mixture = Mixture(data.model_copy(update={"sources": sources}), seed=0, global_batch=SIZES)
    with build_loader(mixture, rank=0, world_size=1, cursor=Cursor()) as loader:
        found = list(loader)
    assert len(found) == mixture.steps
    read = sum(len(batch) for batch in found)
    assert 2 * mixture.num_samples - SIZES[11] < read <= 2 * mixture.num_samples
    assert np.bincount(np.concatenate([batch.sample.numpy() for batch in found])).max() == 2


def test_the_first_frames_of_a_short_first_size(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(), seed=0, global_batch={0: 2, 1: 4})
    frames = first_frames(mixture, 9)
    with build_loader(mixture, rank=0, world_size=1, cursor=Cursor()) as loader:
        expected = torch.cat([batch.images.clone() for batch in islice(loader, 3)])[:9]
    assert torch.equal(frames, expected)


def test_bad_batches_are_left_out_over_a_change(two: Callable[..., Data], tmp_path: Path) -> None:
    mixture = Mixture(two(), seed=0, global_batch=SIZES)
    bad = BadBatches(tmp_path / "bad_batches.jsonl", mixture)
    state = RunState(step=7, cursor=Cursor(mixture.batches.before(7)).to_dict(), bad_in_a_row=2)
    bad.record(3, state)
    lines = [json.loads(line) for line in bad.path.read_text().splitlines()]
    assert [(line["batch"], line["step"], len(line["samples"])) for line in lines] == [
        (3, 4, 8), (4, 5, 8), (5, 6, 24), (6, 7, 24),
    ]  # fmt: skip
    assert bad.after(Cursor(mixture.batches.before(3)).to_dict()) == state.cursor
    assert bad.after(Cursor(mixture.batches.before(2)).to_dict()) == Cursor(mixture.batches.before(2)).to_dict()


def test_bad_batches_stay_left_out_where_what_follows_them_changes(two: Callable[..., Data], tmp_path: Path) -> None:
    mixture = Mixture(two(), seed=0, global_batch=8)
    state = RunState(step=7, cursor=Cursor(mixture.batches.before(7)).to_dict(), bad_in_a_row=2)
    BadBatches(tmp_path / "bad_batches.jsonl", mixture).record(3, state)
    at = Cursor(mixture.batches.before(3)).to_dict()
    later = BadBatches(tmp_path / "bad_batches.jsonl", Mixture(two(), seed=0, global_batch={0: 8, 9: 16}))
    assert later.after(at) == state.cursor
    from_there = BadBatches(later.path, Mixture(two(), seed=0, global_batch={0: 8, 5: 16}))
    assert from_there.after(at) == Cursor(from_there.mixture.batches.before(5)).to_dict(), "3 and 4 are as they were"
    other = BadBatches(later.path, Mixture(two(), seed=1, global_batch=8))
    assert other.after(at) == at
