"""Reading columns of an MDS shard as arrays, and index.json, without streaming or torch."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from stamo_dist.data.confined import check_columns, check_file_name
from stamo_dist.data.shards import MappedShard, ShardLayout, ShardSpec
from stamo_dist.errors import DataError

INDEX = "index.json"


class _ShardFile(BaseModel):
    basename: str
    bytes: int = Field(ge=0)
    hashes: dict[str, str] = {}


class _Entry(BaseModel):
    raw_data: _ShardFile
    zip_data: _ShardFile | None = None
    samples: int = Field(ge=0)
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]


class _Index(BaseModel):
    shards: list[_Entry]


class IndexedShard(BaseModel):
    """One shard as index.json describes it."""

    name: str  # file name, in the folder of index.json
    nbytes: int
    samples: int
    sha256: str  # "" if index.json has none
    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]

    def spec(self, path: Path) -> ShardSpec:
        """The spec for opening a copy of the shard at `path`."""
        layout = ShardLayout(self.names, self.encodings, self.sizes)
        return ShardSpec(str(path), self.nbytes, self.samples, layout, self.sha256)


def read_index(text: bytes, where: str) -> list[IndexedShard]:
    """Parse an index.json.

    Args:
        text: Its content.
        where: Name of the file, for messages.

    Raises:
        DataError: It is broken, or its shards are compressed, which `stamo data convert` never writes.
    """
    try:
        entries = _Index.model_validate_json(text).shards
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: not an index of shards: {f'{field}: ' if field else ''}{first['msg']}") from None
    shards = []
    for n, entry in enumerate(entries):
        if entry.zip_data is not None:
            raise DataError(f"{where}: shard {n} is compressed; `stamo data` looks at raw shards, convert it again")
        name = entry.raw_data.basename
        check_file_name(name, f"{where}: shard {n}")
        check_columns(entry.column_encodings, where)
        columns = (entry.column_names, entry.column_encodings, entry.column_sizes)
        if len({len(column) for column in columns}) != 1:
            raise DataError(f"{where}: {name}: column_names, column_encodings and column_sizes differ in length")
        sizes = tuple(size or None for size in entry.column_sizes)
        shards.append(
            IndexedShard(
                name=name,
                nbytes=entry.raw_data.bytes,
                samples=entry.samples,
                sha256=entry.raw_data.hashes.get("sha256", ""),
                names=tuple(entry.column_names),
                encodings=tuple(entry.column_encodings),
                sizes=sizes,
            )
        )
    return shards


class ColumnShard:
    """A shard read by columns: columns of fixed size need no Python loop over samples.

    Args:
        spec: The shard; its file must be on local disk.

    Attributes:
        shard: The same shard, read by sample.

    Raises:
        DataError: The file is missing or does not match index.json.
    """

    def __init__(self, spec: ShardSpec):
        self.spec = spec
        self.shard = MappedShard(spec)
        self._data: NDArray[np.uint8] = np.memmap(spec.path, np.uint8, "r")
        # uint32: sample count, then the offset of each sample and of the end.
        self._edges = self._data[4 : 4 * (spec.samples + 2)].view(np.uint32).astype(np.int64)

    def __len__(self) -> int:
        return self.spec.samples

    def spans(self, column: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start and end of the column in the file for each sample, int64 (N,) each.

        Raises:
            DataError: The shard has no such column, or sizes in its samples do not add up.
        """
        names, sizes = self.spec.layout.names, self.spec.layout.sizes
        if column not in names:
            raise DataError(f"{self.spec.path}: no column {column!r}, only {', '.join(names)}")
        n = names.index(column)
        before = 4 * sizes.count(None) + sum(size or 0 for size in sizes[:n])
        varying = sizes[:n].count(None)
        begins = self._edges[:-1] + before + self._varying[:, varying]
        size = sizes[n]
        return begins, begins + (size if size is not None else np.diff(self._varying)[:, varying])

    def vectors(self, column: str) -> NDArray[np.generic]:
        """A column of fixed size, (N, D) of its own type; D = 1 for `int` and `float64`.

        Raises:
            DataError: As `spans`; or the column is of varying size.
        """
        begins, _ = self.spans(column)
        encoding = self.spec.layout.encodings[self.spec.layout.names.index(column)]
        dtype, size = _fixed_type(encoding)
        if dtype is None:
            raise DataError(f"{self.spec.path}: column {column!r} is {encoding}, which has no fixed size")
        if not len(begins):
            return np.empty((0, size // dtype.itemsize), dtype)
        return self._windows(size)[begins].view(dtype)

    def values(self, column: str) -> list[bytes]:
        """A column of any encoding, as stored bytes."""
        begins, ends = self.spans(column)
        return [self._data[b:e].tobytes() for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]

    def _windows(self, size: int) -> NDArray[np.uint8]:
        return np.lib.stride_tricks.sliding_window_view(self._data, size)

    @cached_property
    def _varying(self) -> NDArray[np.int64]:
        """Cumulative bytes of the columns of varying size of each sample, (N, columns + 1).

        A sample begins with one uint32 size for every column of varying size.
        """
        sizes = self.spec.layout.sizes
        count, fixed = sizes.count(None), sum(size or 0 for size in sizes)
        begins, lengths = self._edges[:-1], np.diff(self._edges)
        sums = np.zeros((len(begins), count + 1), np.int64)
        short = lengths < 4 * count + fixed
        if count and len(begins) and not short.any():
            heads = self._windows(4 * count)[begins].view(np.uint32)
            np.cumsum(heads, axis=1, dtype=np.int64, out=sums[:, 1:])
        wrong = np.flatnonzero(short | (4 * count + fixed + sums[:, -1] != lengths))
        if len(wrong):
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise DataError(f"{self.spec.path}: sample {wrong[0]}{more}: the sizes of its columns do not add up")
        return sums


def _fixed_type(encoding: str) -> tuple[np.dtype | None, int]:
    """The element type of an MDS encoding of fixed size, and its bytes."""
    kind, _, rest = encoding.partition(":")
    if kind == "ndarray":
        name, _, shape = rest.partition(":")
        if not shape:
            return None, 0
        dtype = np.dtype(name)
        return dtype, dtype.itemsize * int(np.prod([int(n) for n in shape.split(",")]))
    try:
        dtype = np.dtype(np.int64 if kind == "int" else kind)
    except TypeError:
        return None, 0
    return (dtype, dtype.itemsize) if dtype.kind in "iuf" else (None, 0)
