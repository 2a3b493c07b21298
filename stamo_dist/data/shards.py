"""Memory-mapped MDS shards: random access to any column of any sample.

Loader workers import this module, so it must stay free of torch and streaming: a worker then starts in a tenth of a
second and takes 40 MB.
"""

from __future__ import annotations

import builtins
import mmap
import os
import resource
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from stamo_dist.data.cache import lock_shared
from stamo_dist.data.confined import check_columns
from stamo_dist.errors import DataError

_INT = struct.Struct("<q")


@dataclass(frozen=True)
class ShardLayout:
    """Columns of a shard as index.json gives them; a size of None is a column of varying size."""

    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class ShardSpec:
    """Path of a raw shard on local disk, and its index.json entry."""

    path: str
    nbytes: int
    samples: int
    layout: ShardLayout
    digest: str  # content hash


class _Columns:
    """Positions of a layout's columns within a sample. Shards share this object, so that it stays in the CPU's caches.

    Attributes:
        heads: A sample begins with one uint32 size for every column of varying size.
        fixed: Bytes of a sample's heads and columns of fixed size.
        places: Name → what precedes the column (bytes of fixed size, columns of varying size), and its own size.
    """

    def __init__(self, layout: ShardLayout):
        sizes = layout.sizes
        self.heads = struct.Struct(f"<{sum(size is None for size in sizes)}I")
        self.fixed = self.heads.size + sum(size or 0 for size in sizes)
        self.places = {
            name: (
                self.heads.size + sum(size or 0 for size in sizes[:n]),
                sum(size is None for size in sizes[:n]),
                sizes[n],
            )
            for n, name in enumerate(layout.names)
        }

    @cached_property
    def timestep_columns(self) -> tuple[int, int, int, int, struct.Struct]:
        """Positions of `t` and `length` as in `places`, and the struct format to unpack there: length, proprioception.

        MDS sorts columns by name, so only vectors, of fixed size, lie between these two.
        """
        (t_at, t_varying, _), (at, varying, _) = self.places["t"], self.places["length"]
        last, _, size = self.places.get("proprio", (at + _INT.size, 0, 0))
        return t_at, t_varying, at, varying, struct.Struct(f"<q{last - at - _INT.size}x{size}s")


_columns = lru_cache(_Columns)


class MappedShard:
    """One raw MDS shard, memory-mapped.

    Args:
        spec: The shard; its file must be on local disk.
        cached: It is in a cache, which must not remove it while it is mapped.

    Raises:
        DataError: The file is missing or does not match index.json.
    """

    __slots__ = ("_begins", "_columns", "_map", "spec")

    def __init__(self, spec: ShardSpec, *, cached: bool = False):
        self.spec = spec
        try:
            with open(spec.path, "rb") as file:
                # The map holds a duplicate of the descriptor and so keeps the lock.
                if cached and not lock_shared(file.fileno()):
                    raise DataError(f"{spec.path}: was removed from the cache when it was to be read")
                size = os.fstat(file.fileno()).st_size
                if size != spec.nbytes:
                    raise DataError(f"{spec.path}: {size} bytes, but index.json says {spec.nbytes}")
                self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as e:
            raise DataError(f"{spec.path}: {e.strerror or e}") from None
        table = 4 * (spec.samples + 2)  # uint32: sample count, then the offset of each sample and of the end
        header = self._map[:table].cast("I") if table <= size else None
        if header is None or header[0] != spec.samples or header[-1] != size or header[1] < table:
            raise DataError(f"{spec.path}: its header does not match index.json")
        self._begins = header[1:]
        self._columns = _columns(spec.layout)
        if (np.diff(np.asarray(self._begins).astype(np.int64)) < self._columns.fixed).any():
            raise DataError(f"{spec.path}: the table of samples in its header is corrupt")

    def __len__(self) -> int:
        return self.spec.samples

    def __contains__(self, column: str) -> bool:
        return column in self._columns.places

    def _heads_of(self, i: int) -> tuple[int, tuple[int, ...]]:
        """Offset of sample `i`, and the sizes of its columns of varying size."""
        begin, columns = self._begins[i], self._columns
        try:
            heads = columns.heads.unpack_from(self._map, begin)
        except struct.error:
            heads = ()
        if begin + columns.fixed + sum(heads) != self._begins[i + 1]:
            raise DataError(f"{self.spec.path}: sample {i}: the sizes of its columns do not add up")
        return begin, heads

    def bytes(self, i: int, column: str) -> memoryview:
        """The stored bytes of one column of sample `i`, without a copy; valid while the view is held.

        Raises:
            DataError: The shard has no such column, or the sample is corrupt.
        """
        begin, heads = self._heads_of(i)
        try:
            fixed, varying, size = self._columns.places[column]
        except KeyError:
            raise DataError(f"{self.spec.path}: no column {column!r}, only {list(self._columns.places)}") from None
        at = begin + fixed + sum(heads[:varying])
        return self._map[at : at + (heads[varying] if size is None else size)]

    def timestep(self, i: int) -> tuple[int, int, builtins.bytes]:
        """(frame number in its episode, frames of the episode, proprioception as stored or b"") of sample `i`.

        Raises:
            DataError: The sample is corrupt, or its episode does not fit the shard.
        """
        begin, heads = self._heads_of(i)
        t_at, t_varying, at, varying, vectors = self._columns.timestep_columns
        (t,) = _INT.unpack_from(self._map, begin + t_at + sum(heads[:t_varying]))
        length, proprio = vectors.unpack_from(self._map, begin + at + sum(heads[:varying]))
        if not 0 <= t < length or i + length - t > self.spec.samples:
            raise DataError(f"{self.describe(i)}: frame {t} of {length} does not fit a shard of {self.spec.samples}")
        return t, length, proprio

    def run(self, start: int, stop: int, column: str) -> builtins.bytes:
        """The stored bytes of a column of fixed size of samples `start` up to `stop`, concatenated."""
        fixed, varying, size = self._columns.places[column]
        begins: Sequence[int] = self._begins[start:stop]
        if varying:
            begins = [begin + sum(self._heads_of(start + k)[1][:varying]) for k, begin in enumerate(begins)]
        end = fixed + (size or 0)
        return b"".join([self._map[begin + fixed : begin + end] for begin in begins])

    def sample(self, i: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Sample `i` as a dict, decoded by streaming's own encodings; only `columns` when given.

        Raises:
            DataError: The sample is corrupt, or a column is of a type that may run code.
        """
        import stamo_dist._streaming  # noqa: F401, I001  must precede streaming
        from streaming.base.format.mds.encodings import mds_decode

        layout = self.spec.layout
        check_columns(layout.encodings, self.spec.path)
        try:
            return {
                name: mds_decode(encoding, bytes(self.bytes(i, name)))
                for name, encoding in zip(layout.names, layout.encodings, strict=True)
                if columns is None or name in columns
            }
        except (ValueError, TypeError, KeyError, IndexError) as e:
            raise DataError(f"{self.spec.path}: sample {i}: {e}") from e

    def frame(self, i: int, out: NDArray[np.uint8]) -> None:
        """Decode the JPEG of sample `i` into `out`, uint8 (H, W, 3), contiguous.

        Raises:
            DataError: It is not a complete JPEG or has another size; names the shard, the sample and the episode.
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


def mappings_allowed() -> int:
    """Number of files a process may keep mapped: each holds a descriptor, and 1024 is a common soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        soft = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(soft // 2, min(soft - 1024, 1 << 15))


class OpenShards:
    """The shards of a dataset by number; the `limit` most recently used stay mapped.

    Args:
        specs: The shards.
        limit: Maximum number of mapped shards; by the process's limit of open files when omitted.
        open_shard: Function that maps a shard by number; when omitted the files must stay on local disk.
    """

    def __init__(
        self,
        specs: Sequence[ShardSpec],
        limit: int | None = None,
        open_shard: Callable[[int], MappedShard] | None = None,
    ):
        self._map = open_shard or (lambda number: MappedShard(specs[number]))
        self._limit = mappings_allowed() if limit is None else limit
        self._open: OrderedDict[int, MappedShard] = OrderedDict()

    def __getitem__(self, number: int) -> MappedShard:
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = self._map(number)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return shard

    def __len__(self) -> int:
        """Number of mapped shards."""
        return len(self._open)

    def forget(self, number: int) -> None:
        """Unmap a shard, if it is mapped."""
        self._open.pop(number, None)
