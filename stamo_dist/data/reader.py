"""Fills batches: mapped shards → decoded, augmented frames in memory that processes share.

Loader workers run this module, so it must stay free of torch (but for augmentation) and of streaming.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.latents import LatentFiles, LatentSpec
from stamo_dist.data.shards import Layout, OpenShards, ShardSpec
from stamo_dist.errors import DataError

#: Frames begin this many bytes into a slot. libjpeg-turbo writes rows that are aligned to 32 bytes around the cache,
#: which costs a twentieth of the decoding time; rows are multiples of 32 bytes, so 16 keeps all of them off.
_SHIFT = 16


@dataclass(frozen=True)
class Work:
    """One batch to read: how many samples, of which epoch; the slot holds their numbers and takes their frames."""

    slot: int
    epoch: int
    size: int


@dataclass(frozen=True)
class SlotShape:
    """What one slot holds: uint8 (batch, size, size, 3) frames, with a cache 2-byte latents (batch, C, h, w), and the
    int64 (batch,) numbers of the samples.
    """

    batch: int
    image_size: int
    latent: tuple[int, ...] | None = None


class Slots:
    """Memory for `count` batches that several processes map.

    It is written again and again, because the kernel takes as long to give fresh shared pages as the decoder to fill
    them. It is anonymous: nothing of it is visible in /dev/shm, its size is not bounded by that mount, and it is gone
    with the last process that maps it.
    """

    def __init__(self, shape: SlotShape, count: int, fd: int | None = None):
        self.shape, self.count = shape, count
        self._latents_at = _round_up(_SHIFT + shape.batch * shape.image_size**2 * 3, 8)
        latents = 2 * shape.batch * prod(shape.latent) if shape.latent else 0
        self._samples_at = _round_up(self._latents_at + latents, 8)
        self._stride = _round_up(self._samples_at + 8 * shape.batch, mmap.PAGESIZE)
        self.fd = _anonymous_file(self._stride * count) if fd is None else fd
        self._map = mmap.mmap(self.fd, self._stride * count)

    def images(self, slot: int, n: int) -> NDArray[np.uint8]:
        """The first `n` frames of a slot, uint8 (n, H, W, 3)."""
        side = self.shape.image_size
        flat = np.frombuffer(self._map, np.uint8, n * side * side * 3, slot * self._stride + _SHIFT)
        return flat.reshape(n, side, side, 3)

    def latents(self, slot: int, n: int) -> NDArray[np.uint16]:
        """The first `n` latents of a slot as bit patterns, uint16 (n, C, h, w)."""
        assert self.shape.latent is not None, "slots without latents"
        size = n * prod(self.shape.latent)
        flat = np.frombuffer(self._map, np.uint16, size, slot * self._stride + self._latents_at)
        return flat.reshape(n, *self.shape.latent)

    def samples(self, slot: int, n: int) -> NDArray[np.int64]:
        """The numbers of the first `n` samples of a slot, int64 (n,)."""
        return np.frombuffer(self._map, np.int64, n, slot * self._stride + self._samples_at)

    def close(self) -> None:
        """Give up the descriptor; batches that are still held keep the memory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("stamo-batches", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


@dataclass(frozen=True)
class ReaderSpec:
    """All a worker has to know; sent to it once, as JSON."""

    shards: Sequence[ShardSpec]
    source: Sequence[str]  # (shards,) name of the source each shard belongs to
    slots: SlotShape
    count: int  # of slots
    seed: int
    augment: tuple[float, float, float] | None  # crop, brightness, contrast
    latents: LatentSpec | None

    def dumps(self) -> bytes:
        layouts = list(dict.fromkeys(shard.layout for shard in self.shards))
        number = {layout: i for i, layout in enumerate(layouts)}
        return json.dumps(
            {
                "layouts": [astuple(layout) for layout in layouts],
                "shards": [(s.path, s.nbytes, s.samples, number[s.layout], s.digest) for s in self.shards],
                "source": list(self.source),
                "slots": astuple(self.slots),
                "count": self.count,
                "seed": self.seed,
                "augment": self.augment,
                "latents": None if self.latents is None else astuple(self.latents),
            }
        ).encode()

    @classmethod
    def loads(cls, text: bytes) -> ReaderSpec:
        raw = json.loads(text)
        layouts = [Layout(*map(tuple, layout)) for layout in raw["layouts"]]
        shards = [ShardSpec(path, size, n, layouts[i], digest) for path, size, n, i, digest in raw["shards"]]
        batch, image_size, latent = raw["slots"]
        latents = None
        if raw["latents"] is not None:
            files, shape, precision = raw["latents"]
            latents = LatentSpec(files, tuple(shape), precision)
        return cls(
            shards, raw["source"], SlotShape(batch, image_size, latent and tuple(latent)), raw["count"], raw["seed"],
            raw["augment"] and tuple(raw["augment"]), latents,
        )  # fmt: skip


class Reader:
    """Reads batches into slots."""

    def __init__(self, spec: ReaderSpec, slots: Slots):
        self._spec, self._slots = spec, slots
        self._shards = OpenShards(spec.shards)
        counts = np.array([shard.samples for shard in spec.shards], np.int64)
        self._first = counts.cumsum() - counts
        self._latents = LatentFiles(spec.latents) if spec.latents else None
        self._augment = None
        if spec.augment is not None:
            from stamo_dist.data.transforms import Augmentation

            self._augment = Augmentation(*spec.augment, seed=spec.seed)

    def fill(self, work: Work) -> None:
        """Read one batch into its slot.

        Raises:
            DataError: A shard, sample or latent is missing or corrupt; names the source, shard, sample and episode.
        """
        samples = self._slots.samples(work.slot, work.size)
        numbers = np.searchsorted(self._first, samples, side="right") - 1
        rows = (samples - self._first[numbers]).tolist()
        images = self._slots.images(work.slot, work.size)
        for out, number, row in zip(images, numbers.tolist(), rows, strict=True):
            try:
                self._shards[number].frame(row, out)
            except DataError as e:
                raise DataError(f"source {self._spec.source[number]}: {e}") from None
        if self._augment is not None:
            for out, sample in zip(images, samples.tolist(), strict=True):
                self._augment(out, work.epoch, sample)
        if self._latents is not None:
            latents = self._slots.latents(work.slot, work.size)
            for i, (number, row) in enumerate(zip(numbers.tolist(), rows, strict=True)):
                latents[i] = self._latents[number][row]
