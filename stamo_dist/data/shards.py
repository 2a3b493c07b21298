"""Mapped MDS shards: any column of any sample without opening the file again.

Loader workers import this module, so it must stay free of torch and streaming: a worker then starts in a tenth of a
second and takes 40 MB.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from stamo_dist.errors import DataError


@dataclass(frozen=True)
class Layout:
    """Columns of a shard as index.json gives them; a size of None is a column of varying size."""

    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class ShardSpec:
    """Where one raw shard lies on local disk and what index.json says about it."""

    path: str
    nbytes: int
    samples: int
    layout: Layout
    digest: str  # identifies the content


class MappedShard:
    """One raw MDS shard, memory-mapped.

    Args:
        spec: The shard; its file must be on local disk.

    Raises:
        DataError: The file is missing or does not match index.json.
    """

    def __init__(self, spec: ShardSpec):
        self.spec = spec
        try:
            with open(spec.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != spec.nbytes:
                    raise DataError(f"{spec.path}: {size} bytes, but index.json says {spec.nbytes}")
                self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as e:
            raise DataError(f"{spec.path}: {e.strerror or e}") from None
        table = 4 * (spec.samples + 2)  # uint32: sample count, then where each sample begins and the last one ends
        header = self._map[:table].cast("I") if table <= size else None
        if header is None or header[0] != spec.samples or header[-1] != size or header[1] < table:
            raise DataError(f"{spec.path}: its header does not match index.json")
        if (np.diff(np.asarray(header[1:]).astype(np.int64)) < 0).any():
            raise DataError(f"{spec.path}: the table of samples in its header is corrupt")
        self._begins = header[1:]
        sizes = spec.layout.sizes
        # A sample begins with one uint32 size for every column of varying size.
        self._heads = struct.Struct(f"<{sum(size is None for size in sizes)}I")
        self._fixed = self._heads.size + sum(size or 0 for size in sizes)
        # What lies before a column: so many bytes of fixed size, and so many columns of varying size.
        self._before = [
            (self._heads.size + sum(size or 0 for size in sizes[:n]), sum(size is None for size in sizes[:n]))
            for n in range(len(sizes) + 1)
        ]

    def __len__(self) -> int:
        return self.spec.samples

    def _column(self, i: int, position: int) -> memoryview:
        begin, end = self._begins[i], self._begins[i + 1]
        try:
            heads = self._heads.unpack_from(self._map, begin)
        except struct.error:
            heads = ()
        if begin + self._fixed + sum(heads) != end:
            raise DataError(f"{self.spec.path}: sample {i}: the sizes of its columns do not add up")
        (fixed, varying), (next_fixed, next_varying) = self._before[position : position + 2]
        return self._map[begin + fixed + sum(heads[:varying]) : begin + next_fixed + sum(heads[:next_varying])]

    def bytes(self, i: int, column: str) -> memoryview:
        """The stored bytes of one column of sample `i`, without a copy; valid while the view is held.

        Raises:
            DataError: The shard has no such column, or the sample is corrupt.
        """
        try:
            position = self.spec.layout.names.index(column)
        except ValueError:
            raise DataError(f"{self.spec.path}: no column {column!r}, only {list(self.spec.layout.names)}") from None
        return self._column(i, position)

    def sample(self, i: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Sample `i` as a dict, decoded by streaming's own encodings; only `columns` when given.

        Raises:
            DataError: The sample is corrupt.
        """
        import stamo_dist._torchvision  # noqa: F401, I001  must precede streaming
        from streaming.base.format.mds.encodings import mds_decode

        layout = self.spec.layout
        try:
            return {
                name: mds_decode(encoding, bytes(self._column(i, n)))
                for n, (name, encoding) in enumerate(zip(layout.names, layout.encodings, strict=True))
                if columns is None or name in columns
            }
        except (ValueError, TypeError, KeyError, IndexError) as e:
            raise DataError(f"{self.spec.path}: sample {i}: {e}") from e

    def frame(self, i: int, out: NDArray[np.uint8]) -> None:
        """Decode the JPEG of sample `i` into `out`, uint8 (H, W, 3), contiguous.

        Raises:
            DataError: It is not a whole JPEG or not of that size; names the shard, the sample and the episode.
        """
        try:
            shape = simplejpeg.decode_jpeg(self.bytes(i, "image"), "RGB", True, False, 0, 0, 1, out).shape
        except (ValueError, TypeError) as e:
            raise DataError(
                f"{self.describe(i)}: not a whole JPEG of {out.shape[1]} × {out.shape[0]} px: {e}"
            ) from None
        if shape != out.shape:
            raise DataError(
                f"{self.describe(i)}: the frame is {shape[1]} × {shape[0]} px, not {out.shape[1]} × {out.shape[0]}"
            )

    def describe(self, i: int) -> str:
        """ "SHARD: sample I (episode E)", for messages."""
        name = f"{self.spec.path}: sample {i}"
        try:
            return f"{name} (episode {bytes(self.bytes(i, 'episode')).decode(errors='replace')})"
        except DataError:
            return name


class OpenShards:
    """The shards of a data set by number; the `limit` used last stay mapped.

    A mapping holds a file descriptor, and clusters often allow 1024 per process.
    """

    def __init__(self, specs: Sequence[ShardSpec], limit: int = 256):
        self._specs = specs
        self._limit = limit
        self._open: OrderedDict[int, MappedShard] = OrderedDict()

    def __getitem__(self, number: int) -> MappedShard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = MappedShard(self._specs[number])
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return shard
