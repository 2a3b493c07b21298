"""The sample order of one source: dealt to lanes once, shuffled anew in every pass; see docs/design/order.md.

A lane has the same slots in every batch and reads its own part of the source, one shard at a time. So a process that
reads a contiguous range of slots reads a contiguous range of lanes, and needs only their shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.allocation import Allocation
from stamo_dist.data.permute import mixed, permuted

_GOLDEN = 0.6180339887498949
_DEAL, _TURN, _WITHIN, _START, _ENTER = range(5)  # purposes of random numbers, mixed into their keys
_SPREAD = 8  # neighbouring shards that are shuffled in the deal
_FEWEST = 8  # minimum number of lanes of a source, if it has as many shards
_KEPT = 4  # cached parts of passes per source


class Drawn(NamedTuple):
    """Some of a source's samples, by position in the source's own stream; all int64 (n,)."""

    position: NDArray[np.int64]  # in the order of batches and, within a batch, slots
    lane: NDArray[np.int64]
    turn: NDArray[np.int64]  # samples that the lane has given before, since the stretch began


@dataclass(frozen=True)
class Lanes:
    """The lanes of a source over one stretch of batches.

    A row (consecutive slots, or the spare slots) is served by one lane or by several in turn.

    Attributes:
        row: int64 (slots,), the row of each of the source's slots; the spare slots form one more row.
        first: int64 (rows,), the first slot of each row but the last.
        width: int64 (rows,), the number of their slots.
        ways: int64 (rows + 1,), number of lanes that serve each row in turn.
        base: int64 (rows + 1,), the first of these lanes.
    """

    row: NDArray[np.int64]
    first: NDArray[np.int64]
    width: NDArray[np.int64]
    ways: NDArray[np.int64]
    base: NDArray[np.int64]

    @classmethod
    def cut(cls, slots: int, rate: float, lanes: float, shards: int) -> Lanes:
        """About `lanes` lanes (with a minimum) for `slots` slots and on average `rate` further samples per batch."""
        lanes, few = max(1, round(lanes)), min(_FEWEST, shards)
        rows = min(slots, max(lanes, few))
        row = np.arange(slots) * rows // max(1, slots)
        width = np.bincount(row, minlength=rows)
        ways = np.full(rows + 1, max(1, -(-min(max(lanes, few), shards) // max(1, rows))))
        ways[-1] = max(1, few, min(shards, round(lanes * rate / (slots + rate)))) if rate else 1
        return cls(row, width.cumsum() - width, width, ways, ways.cumsum() - ways)

    def lane(self, row: NDArray[np.int64], count: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The lane that gives a row's sample number `count` of the stretch, and the samples it gave before."""
        turn, way = np.divmod(count, self.ways[row])
        return self.base[row] + way, turn

    def given(self, batches: int, spare: int, rest: int) -> NDArray[np.int64]:
        """Samples that each lane gave in this many batches and `rest` samples of the next.

        Args:
            batches: Batches since the stretch began.
            spare: Samples that filled spare slots in them.
            rest: Samples of the following batch, in the order of its slots.
        """
        whole = batches * self.width + (rest - self.first).clip(0, self.width)
        counts = np.append(whole, spare + max(0, rest - len(self.row)))
        row = np.repeat(np.arange(len(self.ways)), self.ways)
        way = np.arange(len(row)) - self.base[row]
        return (counts[row] + self.ways[row] - 1 - way) // self.ways[row]


class SourceLanes:
    """Position in a source's stream → sample, for every stretch of a run.

    Args:
        first: int64 (shards,), number of each shard's first sample in the mixture.
        counts: int64 (shards,), samples per shard.
        allocation: The mixture's.
        source: Index of the source in the allocation.
        lanes: Number of lanes of all sources together.
        seed: The run's.

    Attributes:
        samples: Samples of one pass.
    """

    def __init__(
        self,
        first: NDArray[np.int64],
        counts: NDArray[np.int64],
        allocation: Allocation,
        source: int,
        lanes: int,
        seed: int,
    ):
        self._allocation, self._source, self._most, self._seed = allocation, source, lanes, seed
        self.samples = int(counts.sum())
        dealt = _dealt(len(counts), int(mixed(seed, source, _DEAL)[0]))
        self._first, self._counts = first[dealt], counts[dealt]
        self._stored = dealt
        self._ends = self._counts.cumsum()
        self._parts: dict[tuple[int, int], _Dealt | _Remaining] = {}  # by stretch and pass; the latest are kept
        self.lanes = lru_cache(maxsize=4)(self._new_lanes)

    def _new_lanes(self, stretch: int) -> Lanes:
        of, s = self._allocation.stretches[stretch], self._source
        slots, rate = int(of.slots[s]), float(of.rates[s])
        size = self._allocation.batches.at(of.start)
        return Lanes.cut(slots, rate, self._most * (slots + rate) / size, len(self._counts))

    def at(self, stretch: int, drawn: Drawn) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Sample numbers int64 (n,) and passes int32 (n,) of samples drawn in a stretch."""
        passes = drawn.position // self.samples
        samples = np.empty(len(passes), np.int64)
        for number in np.unique(passes):
            mine = passes == number
            part = self._part(stretch, int(number))
            samples[mine] = part.sample(drawn.lane[mine], drawn.turn[mine] - part.before[drawn.lane[mine]])
        return samples, passes.astype(np.int32)

    def _given(self, stretch: int, position: int) -> NDArray[np.int64]:
        """Samples that each lane of a stretch gave before a position of the source's stream."""
        of, s = self._allocation.stretches[stretch], self._source
        low, high = 0, 1
        while of.counts_after(high)[s] <= position:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if of.counts_after(middle)[s] <= position else (low, middle)
        batches = low
        spare = int(of.spares(batches, 0)[1][s])
        return self.lanes(stretch).given(batches, spare, position - int(of.counts_after(batches)[s]))

    def _part(self, stretch: int, number: int) -> _Dealt | _Remaining:
        """The part of a pass that the lanes of a stretch read."""
        begin, end = number * self.samples, (number + 1) * self.samples
        links = self._links(stretch, number)
        for previous, link in zip([None, *links], links, strict=False):
            if (link, number) in self._parts:
                continue
            entered = int(self._allocation.stretches[link].counts[self._source])
            before = self._given(link, max(begin, entered))
            # Sized as if the stretch lasted until the end of the pass; samples not reached go to the next one.
            sizes = self._given(link, end) - before
            if previous is None:
                self._parts[link, number] = self._deal(number, before, sizes)
            else:
                earlier = self._parts[previous, number]
                given = self._given(previous, entered) - earlier.before
                self._parts[link, number] = _Remaining.of(before, sizes, earlier, given)
            while len(self._parts) > _KEPT:
                self._parts.pop(next(iter(self._parts)))
        return self._parts[stretch, number]

    def _links(self, stretch: int, number: int) -> list[int]:
        """The stretches up to this one in which a pass is read, from the last with a cached part, else the first."""
        stretches, s, links = self._allocation.stretches, self._source, [stretch]
        while (links[0], number) not in self._parts:
            entered = stretches[links[0]].counts[s]
            if entered <= number * self.samples:
                break
            links.insert(0, next(e for e in range(links[0] - 1, -1, -1) if stretches[e].counts[s] < entered))
        return links

    def _deal(self, number: int, before: NDArray[np.int64], sizes: NDArray[np.int64]) -> _Dealt:
        """Deal a whole pass to the lanes."""
        cuts = sizes.cumsum()
        ends = np.union1d(self._ends, cuts)
        ends = ends[ends > 0]
        starts = np.append(0, ends[:-1])
        lane = np.searchsorted(cuts, starts, side="right")
        shard = np.searchsorted(self._ends, starts, side="right")
        turn = self._turns(number, lane, shard)
        order = np.lexsort((turn, lane))
        starts, lengths, shard = starts[order], (ends - starts)[order], shard[order]
        of_lane = np.arange(len(sizes))
        part = sizes // np.bincount(lane, minlength=len(sizes)).clip(1)  # within about one shard
        random = mixed(self._seed, self._source, _ENTER, number, of_lane)
        enters = (random % part.clip(1).astype(np.uint64)).astype(np.int64)
        sample = self._first[shard] + starts - (self._ends[shard] - self._counts[shard])
        return _Dealt(
            before=before,
            sizes=sizes,
            cuts=np.append(0, cuts[:-1]),
            begins=lengths.cumsum() - lengths,
            lengths=lengths,
            samples=sample,
            keys=mixed(self._seed, self._source, _WITHIN, number, sample),
            enters=enters,
        )

    def _turns(self, number: int, lane: NDArray[np.int64], shard: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each part of a shard, its place in the reading order of its lane.

        All lanes use the same random order of positions, but each starts at another position, so that the shards open
        at one time are spread over the whole source.
        """
        size = np.bincount(lane)
        stored = np.lexsort((self._stored[shard], lane))
        rank = np.empty(len(lane), np.int64)
        rank[stored] = np.arange(len(lane)) - (size.cumsum() - size)[lane]
        parts = size[lane]
        key = mixed(self._seed, self._source, _TURN, number, parts)
        offset = ((lane * _GOLDEN + mixed(self._seed, self._source, _START, number) / 2.0**64) % 1 * parts).astype(int)
        return permuted((rank + offset) % parts, parts, key)


@dataclass(frozen=True)
class _Dealt:
    """A pass that begins in a stretch, lane by lane and shard by shard."""

    before: NDArray[np.int64]  # (lanes,) what each lane gave before the pass
    sizes: NDArray[np.int64]  # (lanes,) samples of the pass that each has
    cuts: NDArray[np.int64]  # (lanes,) where they begin
    begins: NDArray[np.int64]  # (parts,) where each part of a shard begins
    lengths: NDArray[np.int64]  # (parts,)
    samples: NDArray[np.int64]  # (parts,) number of its first sample
    keys: NDArray[np.uint64]  # (parts,) of the order within
    enters: NDArray[np.int64]  # (lanes,) where in its part each begins

    def sample(self, lane: NDArray[np.int64], turn: NDArray[np.int64]) -> NDArray[np.int64]:
        place = self.cuts[lane] + (turn + self.enters[lane]) % self.sizes[lane]
        part = np.searchsorted(self.begins, place, side="right") - 1
        return self.samples[part] + permuted(place - self.begins[part], self.lengths[part], self.keys[part])

    def rest(self, given: NDArray[np.int64]) -> _Pieces:
        """The samples that each lane has not given yet, lane by lane."""
        return _Pieces(np.arange(len(given)), given, self.sizes - given)


class _Pieces(NamedTuple):
    """Consecutive runs of samples of a `_Dealt`; all int64 (pieces,)."""

    lane: NDArray[np.int64]
    turn: NDArray[np.int64]
    length: NDArray[np.int64]


@dataclass(frozen=True)
class _Remaining:
    """The rest of a pass when the weights changed, divided among the new lanes in lane order."""

    before: NDArray[np.int64]  # (lanes,) what each lane gave before the pass
    sizes: NDArray[np.int64]  # (lanes,)
    cuts: NDArray[np.int64]  # (lanes,) where they begin
    dealt: _Dealt
    pieces: _Pieces
    begins: NDArray[np.int64]  # (pieces,)

    @classmethod
    def of(
        cls,
        before: NDArray[np.int64],
        sizes: NDArray[np.int64],
        earlier: _Dealt | _Remaining,
        given: NDArray[np.int64],
    ) -> _Remaining:
        dealt = earlier.dealt if isinstance(earlier, _Remaining) else earlier
        pieces = earlier.rest(given)
        begins = pieces.length.cumsum() - pieces.length
        return cls(before, sizes, sizes.cumsum() - sizes, dealt, pieces, begins)

    def sample(self, lane: NDArray[np.int64], turn: NDArray[np.int64]) -> NDArray[np.int64]:
        place = self.cuts[lane] + turn
        piece = np.searchsorted(self.begins, place, side="right") - 1
        return self.dealt.sample(self.pieces.lane[piece], self.pieces.turn[piece] + place - self.begins[piece])

    def rest(self, given: NDArray[np.int64]) -> _Pieces:
        """The samples that each lane has not given yet, lane by lane; adjacent pieces of the deal are merged."""
        starts, ends = self.cuts + given, self.cuts + self.sizes
        edges = np.unique(np.concatenate([starts, ends, self.begins]))
        begins, lengths = edges[:-1], np.diff(edges)
        left = begins < ends[np.searchsorted(starts, begins, side="right") - 1]
        left &= begins >= starts[0]
        begins, lengths = begins[left], lengths[left]
        piece = np.searchsorted(self.begins, begins, side="right") - 1
        lane, turn = self.pieces.lane[piece], self.pieces.turn[piece] + begins - self.begins[piece]
        new = np.append(True, (lane[1:] != lane[:-1]) | (turn[1:] != turn[:-1] + lengths[:-1]))
        return _Pieces(lane[new], turn[new], np.add.reduceat(lengths, np.flatnonzero(new)))


def _dealt(shards: int, key: int) -> NDArray[np.int64]:
    """An order of shards (shards,) in which any run is spread over all of them.

    Multiples of the golden ratio have this property (three-distance theorem); shuffling neighbours makes it random.
    """
    random = np.random.Generator(np.random.Philox(key=key))
    near = np.argsort(np.arange(shards) + random.uniform(0, _SPREAD, shards), kind="stable")
    return near[np.argsort(np.argsort((np.arange(shards) * _GOLDEN + random.uniform()) % 1, kind="stable"))]
