"""Mixtures: from a recipe's sources to shards, and the sample at every position of the training stream.

The stream is endless and belongs to the run, not to a rank: global batch after global batch, of one size or of sizes
that change at given steps, the same on any number of processes. `Allocation` gives each source's number of samples and
slots in a batch; `SourceLanes` which of the source's samples. Both compute any position directly, so a position is one
number and memory does not grow with the data. (`Schedule` and `SourceOrder` do this in the order of groups.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.allocation import Allocation, allocation_of
from stamo_dist.data.frame_cache import CacheSpec, Kind, find_cache
from stamo_dist.data.group_order import GroupOrder, SourceOrder
from stamo_dist.data.lane_order import LaneOrder
from stamo_dist.data.node import NodeShare
from stamo_dist.data.opening import open_all
from stamo_dist.data.plan import BatchPlan, SampleOrder
from stamo_dist.data.reader import Window
from stamo_dist.data.schedule import Schedule
from stamo_dist.data.shard_table import Shards
from stamo_dist.data.sources import open_cache
from stamo_dist.data.view import CameraView
from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.recipe.data import Data, SourceConfig

#: Fields of `data.shuffle` that determine each order; runs from before lanes existed have only the first order.
GROUPS = {"enabled", "algorithm", "block_size"}
LANES = {"enabled", "order", "lanes"}


class Mixture:
    """The sources of a recipe, checked, and their sample order.

    Args:
        data: The recipe's `data` section.
        seed: The run's, which determines the order.
        global_batch: Samples per optimizer step over all processes, or step → samples from there on.
        growth: Source → for each of its paths, the number of growths to read; others are read as they are.
        node: Sharing between ranks of a node that make the same mixture at once: one of them reads the sources.

    Attributes:
        batches: Sizes of the global batches.
        sources: Names of the sources with a weight above 0, in the recipe's order.
        cache: Folder of remote shards.
        file: The data read from the sources.
        opened: The folders of each source.
        streams: One per folder and camera, in the order of `sources`; with `data.views`, one per folder.
        views: The streams' shards, and those of each further camera of the same timesteps.
        stream_source: int64 (streams,), index into `sources`.
        num_samples: Frames in all streams; sample numbers are below it.
        frames: int64 (sources,), frames of each source over its cameras.
        schedule: Number of samples of each source among the first n.
        order: The samples of each batch.
        steps: Maximum optimizer steps for the data; None without limit.
        fingerprint: Changes whenever any batch would.

    Raises:
        DataError: All problems of all sources at once.
    """

    def __init__(
        self,
        data: Data,
        seed: int,
        global_batch: int | Mapping[int, int],
        growth: Mapping[str, Sequence[int]] = MappingProxyType({}),
        node: NodeShare | None = None,
    ):
        self.data, self.seed, self.batches = data, seed, BatchSizes.of(global_batch)
        used = data.used
        self.sources = list(used)
        self.node = node
        self._caches: dict[tuple[Kind, str], CacheSpec] = {}
        self.cache = open_cache(data.cache, data.cache_limit)
        opened = open_all(data, growth, self.cache, node)
        self.file, self.opened, streams = opened.file, opened.folders, opened.streams
        cameras = [stream for of_source in streams for stream in of_source]
        # The cameras of one timestep are adjacent.
        self.views = [CameraView(cameras[v :: data.views]) for v in range(data.views)]
        view, self.streams = self.views[0], self.views[0].streams
        of_sources = [len(of_source) // data.views for of_source in streams]
        self.stream_source = np.repeat(np.arange(len(streams)), of_sources)
        self.shards, self.first, self.num_samples = view.shards, view.first, view.samples
        counts = self.shards.samples
        self.shard_source = self.stream_source[view.shard_stream]  # (shards,)
        bounds = np.searchsorted(self.shard_source, np.arange(len(used) + 1))
        self._source_first = self.first[bounds[:-1]]
        shards = [(self.first[a:b], counts[a:b]) for a, b in pairwise(bounds)]
        self.frames = np.array([of_source.sum() for _, of_source in shards], np.int64)
        self.schedule = allocation_of(data, self.frames.tolist(), self.batches)
        self.order: SampleOrder
        if isinstance(self.schedule, Allocation):
            self.order = LaneOrder(self.schedule, shards, self.batches, data.shuffle.lanes, seed)
        else:
            orders = [SourceOrder(*of_source, data.shuffle, seed) for of_source in shards]
            self.order = GroupOrder(self.schedule, orders, self.batches, seed, shuffle=data.shuffle.enabled)
        self.steps = None if self.schedule.end == np.inf else self.batches.batches(int(self.schedule.end))
        self.window = self._window() if data.horizon else None
        self.fingerprint = self._fingerprint(self.data, self.batches, self.schedule)

    def plan(self, batch: int, count: int, slots: NDArray[np.int64] | None = None) -> BatchPlan:
        """Global batches `batch` up to `batch + count`, all slots or these; fewer at the end of the data or a size."""
        return self.order.plan(batch, count, slots)

    def fingerprint_with(self, weights: Mapping[str, Any], global_batch: int | Mapping[Any, int]) -> str:
        """The fingerprint with other weights of some of `sources`, all in use, and another global batch."""
        used = self.data.used
        changed = {n: SourceConfig.model_validate({**used[n].model_dump(), "weight": w}) for n, w in weights.items()}
        data, sizes = self.data.model_copy(update={"sources": self.data.sources | changed}), BatchSizes.of(global_batch)
        return self._fingerprint(data, sizes, allocation_of(data, self.frames.tolist(), sizes))

    def source_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `sources` of each sample number."""
        return np.searchsorted(self._source_first, samples, side="right") - 1

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `shards` of each sample number."""
        return self.views[0].shard_of(samples)

    def find_cache(self, kind: Kind, fingerprint: str) -> CacheSpec:
        """The cached outputs of a frozen model for all shards; searched once, by one of a node's ranks.

        Raises:
            DataError: It is missing, or not of these shards; see `frame_cache.find_cache`.
        """
        if (kind, fingerprint) not in self._caches:
            self._caches[kind, fingerprint] = self._find_cache(kind, fingerprint)
        return self._caches[kind, fingerprint]

    def _find_cache(self, kind: Kind, fingerprint: str) -> CacheSpec:
        if self.node is None:
            return find_cache(self.shards, kind, fingerprint)
        head = self.node.once(kind, lambda: (asdict(find_cache(self.shards, kind, fingerprint)), {})).head
        return CacheSpec(**{**head, "shape": tuple(head["shape"])})

    def shards_of(self, source: int) -> Shards:
        """The shards of one source, in the order of `shards`."""
        tables = zip(self.shards.tables, self.stream_source.tolist(), strict=True)
        return Shards([table for table, of in tables if of == source])

    @property
    def notes(self) -> list[str]:
        """A line for each folder with episodes that are not read because they were added after the run began."""
        return [
            f"{opened.path}: has grown by {opened.later} episodes since this run began, which goes on without them; "
            "a new run reads all"
            for of_source in self.opened
            for opened in of_source
            if opened.later
        ]

    def prepare(self, number: int) -> None:
        """Put raw shard `number` on local disk, if it is remote or packed.

        Raises:
            DataError: It cannot be fetched or unpacked.
        """
        self.views[0].prepare(number)

    def _window(self) -> Window:
        data, used = self.data, list(self.data.used.values())
        horizons = [source.horizon or data.horizon for source in used]
        acting = [
            stream for stream, source in zip(self.streams, self.stream_source, strict=True) if used[source].actions
        ]
        return Window(
            horizon=data.horizon,
            horizons=horizons,
            chunks=[horizon if source.actions else 0 for horizon, source in zip(horizons, used, strict=True)],
            target=data.target,
            action_dim=max((stream.action_dim for stream in acting), default=0),
            proprio_dim=max(stream.proprio_dim for stream in self.streams),
        )

    def _fingerprint(self, data: Data, batches: BatchSizes, schedule: Allocation | Schedule) -> str:
        shuffle = data.shuffle
        identity = {
            "format": 2,
            "shards": self.shards,
            "sources": self._source_first.tolist(),
            "schedule": schedule.identity,
            "shuffle": shuffle.model_dump(include=LANES if shuffle.in_lanes else GROUPS),
            "horizon": [data.horizon, *(s.horizon for s in data.used.values())],
            "seed": self.seed,
            "global_batch": batches.plain,
        }
        if videos := [name for name, source in data.used.items() if not source.actions]:
            identity["videos"] = videos
        if partly := {name: s.labelled for name, s in data.used.items() if s.labelled < 1}:
            identity["labelled"] = partly
        if len(self.views) > 1:
            identity["views"] = [view.shards for view in self.views[1:]]
        digest = hashlib.sha256()
        for part in _json(identity):
            digest.update(part.encode())
        return digest.hexdigest()


def _json(value: Any) -> Iterator[str]:
    """The text of `json.dumps` with sorted keys, in parts; of shards, a list of digest and samples of each."""
    if isinstance(value, Shards):
        for i, part in enumerate(value.contents()):
            yield (", " if i else "[") + json.dumps(part)[1:-1]
        yield "]"
    elif isinstance(value, dict):
        for i, key in enumerate(sorted(value)):
            yield (", " if i else "{") + json.dumps(key) + ": "
            yield from _json(value[key])
        yield "}"
    elif isinstance(value, list) and any(isinstance(item, Shards) for item in value):
        for i, item in enumerate(value):
            yield ", " if i else "["
            yield from _json(item)
        yield "]"
    else:
        yield json.dumps(value)
