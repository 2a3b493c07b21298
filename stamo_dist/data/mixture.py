"""Mixtures: recipe sources → streams → the order of the samples of every epoch.

The order is mosaicml-streaming's own (its sampling, partitioning and shuffling are called, not copied), but it is
planned for the whole world as one rank, and a rank takes every world_size-th sample of each global batch. Streaming
deals the samples to nodes and ranks in the same way, so both deliver the same samples, and a global batch is the same
set on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import gcd

import numpy as np
from numpy.typing import NDArray

import stamo_dist._torchvision  # noqa: F401  # isort: skip  must precede streaming
from streaming import Stream, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.world import World

from stamo_dist.data import shares
from stamo_dist.data.sources import CameraShards, OpenSource, open_camera, open_source, resolve
from stamo_dist.errors import DataError
from stamo_dist.recipe.schema import Data, Shuffle, Source


class Mixture:
    """The sources of a recipe, checked, and their sample order.

    Args:
        data: The recipe's `data` section.
        seed: Of the run; it decides the order.
        global_batch: Samples per optimizer step over all processes.

    Attributes:
        sources: Names of the sources with a weight above 0, in the recipe's order.
        streams: One per source and camera, in the order of `sources`.
        num_samples: Frames in all streams; sample numbers are below it.
        epoch_size: Samples in one epoch: what the recipe asks for, or the number of frames, rounded down to whole
            global batches over all canonical nodes (up, where it is less than that).
        fingerprint: Changes whenever any batch would.

    Raises:
        DataError: All problems of all sources at once.
    """

    def __init__(self, data: Data, seed: int, global_batch: int):
        self.data, self.seed, self.global_batch = data, seed, global_batch
        active = {name: source for name, source in data.sources.items() if source.weight > 0}
        self.sources = list(active)
        self.streams: list[CameraShards] = []
        owner: list[int] = []
        for i, cameras in enumerate(_open_all(active, data)):
            self.streams += cameras
            owner += [i] * len(cameras)
        self.stream_source = np.array(owner, np.int64)  # (streams,) the source of each stream
        self.frames = np.array([stream.frames for stream in self.streams], np.int64)  # (streams,)
        self._stream_first = self.frames.cumsum() - self.frames
        self.num_samples = int(self.frames.sum())
        self.shards = [shard for stream in self.streams for shard in stream.shards]
        counts = np.array([shard.samples for shard in self.shards], np.int64)
        self.first = counts.cumsum() - counts  # (shards,) number of each shard's first sample
        self.shard_stream = np.repeat(np.arange(len(self.streams)), [len(stream.shards) for stream in self.streams])

        canonical_nodes = data.shuffle.canonical_nodes if data.shuffle.enabled else 1
        unit = global_batch * canonical_nodes // gcd(global_batch, canonical_nodes)
        self.epoch_size = max(1, (data.epoch_samples or self.num_samples) // unit) * unit
        self._planner = _Planner(
            [stream.stream for stream in self.streams], self.frames, counts, self.shard_stream, shuffle=data.shuffle,
            canonical_nodes=canonical_nodes, epoch_size=self.epoch_size, batch_size=global_batch, seed=seed,
        )  # fmt: skip
        self.chosen = np.array([stream.stream.choose for stream in self.streams], np.int64)  # (streams,) per epoch
        self.fingerprint = self._fingerprint()

    def plan(self, epoch: int) -> NDArray[np.int64]:
        """The sample numbers of one epoch in order, int64 (epoch_size,): global batch after global batch."""
        order = generate_work("random", self._planner, World(1, 1, 1, 0), epoch, 0).reshape(-1)
        assert len(order) == self.epoch_size, "an epoch of whole batches over all canonical nodes has no padding"
        return order

    def source_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `sources` of each sample number."""
        return self.stream_source[np.searchsorted(self._stream_first, samples, side="right") - 1]

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `shards` of each sample number."""
        return np.searchsorted(self.first, samples, side="right") - 1

    def prepare(self, number: int) -> None:
        """Put raw shard `number` on local disk, if it is remote or packed.

        Raises:
            DataError: It cannot be had.
        """
        stream = self.shard_stream[number]
        self.streams[stream].prepare(number - int(np.searchsorted(self.shard_stream, stream)))

    def report(self, steps: int) -> list[shares.Share]:
        """What `steps` optimizer steps see of each source, against what the recipe asks for."""
        epochs, rest = divmod(steps * self.global_batch, self.epoch_size)
        seen = shares.per_source(self, self.chosen) * epochs
        if rest:
            of_rest = self.source_of(self.plan(epochs)[:rest])
            seen += np.bincount(of_rest, minlength=len(self.sources))
        return shares.report(self, seen)

    def _fingerprint(self) -> str:
        streams = [
            {
                "source": int(owner),
                "proportion": float(stream.stream.proportion),
                "shards": [(shard.digest, shard.samples) for shard in stream.shards],
            }
            for owner, stream in zip(self.stream_source, self.streams, strict=True)
        ]
        identity = {
            "format": 1,
            "streams": streams,
            "shuffle": self.data.shuffle.model_dump(),
            "granularity": self._planner.sampling_granularity,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "epoch_size": self.epoch_size,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class _Planner(StreamingDataset):
    """What streaming's planning reads of a StreamingDataset, without its files, shared memory and threads."""

    def __init__(
        self, streams: Sequence[Stream], frames: NDArray[np.int64], shard_samples: NDArray[np.int64],
        shard_stream: NDArray[np.int64], *, shuffle: Shuffle, canonical_nodes: int, epoch_size: int, batch_size: int,
        seed: int,
    ):  # fmt: skip
        self.streams = streams
        self.num_streams = len(streams)
        self.shards_per_stream = np.bincount(shard_stream, minlength=len(streams))
        self.shard_offset_per_stream = self.shards_per_stream.cumsum() - self.shards_per_stream
        self.samples_per_shard = shard_samples
        self.sample_offset_per_shard = shard_samples.cumsum() - shard_samples
        self.samples_per_stream = frames
        self.epoch_size = Stream.apply_weights(streams, frames, epoch_size, seed)
        self.sampling_method = "balanced"
        # Samples of a partial repeat are drawn one by one in Python, which would take minutes for 10⁸ frames.
        self.sampling_granularity = -(-int(frames.sum()) // 2**20)
        self.shuffle = shuffle.enabled
        self.shuffle_algo = shuffle.algorithm
        self.shuffle_seed = seed
        self.shuffle_block_size = shuffle.block_size
        self.epoch_seed_change = shuffle.enabled
        self.partition_algo = "relaxed"
        self.num_canonical_nodes = canonical_nodes
        self.initial_physical_nodes = None
        self.batch_size = batch_size


def _open_all(sources: dict[str, Source], data: Data) -> list[list[CameraShards]]:
    """Every source's cameras; the source's weight is split over them by frames."""
    problems: list[str] = []
    opened: dict[str, OpenSource] = {}
    for name, source in sources.items():
        try:
            opened[name] = open_source(source.path, data.cache)
        except DataError as e:
            problems.append(f"data.sources.{name}: {e}")
    streams = []
    seen: dict[tuple[str, str, str], str] = {}
    for name, found in opened.items():
        source, manifest = sources[name], found.manifest
        if manifest.image_size != data.image_size:
            problems.append(
                f"data.sources.{name}: {source.path} has frames of {manifest.image_size} px, but data.image_size is "
                f"{data.image_size}; convert it with --size {data.image_size} or change data.image_size"
            )
        cameras = list(dict.fromkeys(manifest.cameras if source.cameras is None else source.cameras))
        if not cameras:
            problems.append(f"data.sources.{name}.cameras: is empty; name some of {', '.join(manifest.cameras)}")
        twice: dict[str, list[str]] = {}
        opened_cameras = []
        for camera in cameras:
            other = seen.setdefault((resolve(source.path), source.split, camera), name)
            if other != name:
                twice.setdefault(other, []).append(camera)
            try:
                # All cameras of a split hold the same number of frames.
                opened_cameras.append(
                    open_camera(found, source.split, camera, proportion=source.weight / len(cameras))
                )  # fmt: skip
            except DataError as e:
                problems.append(f"data.sources.{name}: {e}")
        problems += [
            f"data.sources.{name}: reads the same frames as data.sources.{other} ({source.path}, split "
            f"{source.split}, {', '.join(shared)}); name a source once and give it the sum of the weights"
            for other, shared in twice.items()
        ]
        streams.append(opened_cameras)
    if problems:
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError("\n".join([f"{head} in the data:", *(f"  - {p}" for p in problems)]))
    return streams
