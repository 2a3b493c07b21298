"""Fills batches: mapped shards → decoded, augmented frames in memory that processes share.

Loader workers run this module, so it must stay free of torch (but for augmentation) and of streaming.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.latents import LatentFiles, LatentSpec
from stamo_dist.data.shards import OpenShards, ShardSpec
from stamo_dist.errors import DataError


@dataclass(frozen=True)
class Work:
    """One batch to read: how many samples, of which epoch; the slot holds their numbers and takes their frames."""

    slot: int
    epoch: int
    size: int


@dataclass(frozen=True)
class SlotShape:
    """What one slot holds: uint8 (batch, size, size, 3) frames, with a cache 2-byte latents (batch, C, h, w), and the
    int64 (batch,) numbers of the samples."""

    batch: int
    image_size: int
    latent: tuple[int, ...] | None = None

    @property
    def image_bytes(self) -> int:
        return self.batch * self.image_size**2 * 3

    @property
    def latent_bytes(self) -> int:
        return 2 * self.batch * prod(self.latent) if self.latent else 0

    @property
    def numbers_at(self) -> int:
        return -(-(self.image_bytes + self.latent_bytes) // 8) * 8

    @property
    def nbytes(self) -> int:
        return -(-(self.numbers_at + 8 * self.batch) // mmap.PAGESIZE) * mmap.PAGESIZE


class Slots:
    """Memory for `count` batches that several processes map.

    It is written again and again, because the kernel takes as long to give fresh shared pages as the decoder to fill
    them. It is anonymous: nothing of it is visible in /dev/shm, its size is not bounded by that mount, and it is gone
    with the last process that maps it.
    """

    def __init__(self, shape: SlotShape, count: int, fd: int | None = None):
        self.shape, self.count = shape, count
        if fd is None:
            fd = _anonymous_file(shape.nbytes * count)
        self.fd = fd
        self._map = mmap.mmap(fd, shape.nbytes * count)

    def images(self, slot: int, n: int) -> NDArray[np.uint8]:
        """The first `n` frames of a slot, uint8 (n, H, W, 3)."""
        s = self.shape
        flat = np.frombuffer(self._map, np.uint8, n * s.image_size**2 * 3, slot * s.nbytes)
        return flat.reshape(n, s.image_size, s.image_size, 3)

    def latents(self, slot: int, n: int) -> NDArray[np.uint16]:
        """The first `n` latents of a slot as bit patterns, uint16 (n, C, h, w)."""
        s = self.shape
        assert s.latent is not None, "slots without latents"
        start = slot * s.nbytes + s.image_bytes
        return np.frombuffer(self._map, np.uint16, n * prod(s.latent), start).reshape(n, *s.latent)

    def samples(self, slot: int, n: int) -> NDArray[np.int64]:
        """The numbers of the first `n` samples of a slot, int64 (n,)."""
        return np.frombuffer(self._map, np.int64, n, slot * self.shape.nbytes + self.shape.numbers_at)

    def close(self) -> None:
        """Give up the descriptor; batches that are still held keep the memory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


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
    """All a worker has to know; sent to it once."""

    shards: Sequence[ShardSpec]
    first: NDArray[np.int64]  # (shards,) the mixture's number of each shard's first sample
    source: Sequence[str]  # (shards,) name of the source each shard belongs to
    slots: SlotShape
    count: int
    seed: int
    augment: tuple[float, float, float] | None  # crop, brightness, contrast
    latents: LatentSpec | None


class Reader:
    """Reads batches into slots."""

    def __init__(self, spec: ReaderSpec, slots: Slots):
        self._spec, self._slots = spec, slots
        self._shards = OpenShards(spec.shards)
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
        numbers = np.searchsorted(self._spec.first, samples, side="right") - 1
        rows = (samples - self._spec.first[numbers]).tolist()
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
