"""The shards of sources as columns: the index.json entries of 10⁵ shards take 12 MB. Free of torch and streaming."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.column_file import ColumnFile
from stamo_dist.data.shards import ShardLayout, ShardSpec

_AT_ONCE = 8192
_COLUMNS = ("layout", "samples", "nbytes", "digest", "name", "own", "own_ends")
_OWN = ("raw_data", "zip_data", "samples")  # entry fields that differ within one layout


@dataclass(frozen=True)
class ShardTable(Sequence[ShardSpec]):
    """The shards of one camera and split of a folder; items are created on access.

    Attributes:
        folder: Folder of the raw shards, or where they will be fetched to.
        layouts: The column layouts of the shards.
        layout: int32 (shards,), index into `layouts`.
        samples, nbytes: int64 (shards,), of the raw shards.
        digest, name: bytes (shards,), content hash and file name of the raw shard.
        common: For fetched shards: per layout, the fields that all entries in index.json share.
        own: uint8, the other fields of each entry as JSON, concatenated; their ends are in `own_ends`, int64 (shards,).
    """

    folder: str
    layouts: Sequence[ShardLayout]
    layout: NDArray[np.int32]
    samples: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    digest: NDArray[np.bytes_]
    name: NDArray[np.bytes_]
    common: Sequence[dict[str, Any]]
    own: NDArray[np.uint8]
    own_ends: NDArray[np.int64]
    number: int = -1  # number of the table in the file it was unpacked from

    @classmethod
    def of(
        cls, folder: str, entries: Sequence[dict[str, Any]], prefix: str, checksums: Mapping[str, str], *, keep: bool
    ) -> ShardTable:
        """The table of index.json's entries.

        Args:
            folder: See above.
            entries: One per shard.
            prefix: SPLIT/CAMERA.
            checksums: The manifest's.
            keep: Keep the full entries, which fetching needs.
        """
        raws = [entry["raw_data"] for entry in entries]
        names = [raw["basename"] for raw in raws]
        digests = [checksums.get(f"{prefix}/{name}") or _digest(e) for name, e in zip(names, entries, strict=True)]
        layout, commons = _layouts(entries)
        own = [json.dumps({k: entry[k] for k in _OWN}).encode() for entry in entries] if keep else []
        return cls(
            folder,
            [
                ShardLayout(
                    tuple(common["column_names"]),
                    tuple(common["column_encodings"]),
                    tuple(size or None for size in common["column_sizes"]),
                )
                for common in commons
            ],
            layout,
            np.array([entry["samples"] for entry in entries], np.int64),
            np.array([raw["bytes"] for raw in raws], np.int64),
            np.array([digest.encode() for digest in digests], "S"),
            np.array([name.encode() for name in names], "S"),
            commons if keep else [],
            np.frombuffer(b"".join(own), np.uint8),
            np.cumsum([len(one) for one in own], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return ShardSpec(
            os.path.join(self.folder, self.name[number].decode()),
            int(self.nbytes[number]),
            int(self.samples[number]),
            self.layouts[self.layout[number]],
            self.digest[number].decode(),
        )

    def entry(self, number: int) -> dict[str, Any]:
        """The index.json entry of a shard."""
        if not self.common:  # a local shard, which is never fetched
            with open(os.path.join(self.folder, "index.json"), "rb") as file:
                found: dict[str, Any] = json.load(file)["shards"][number]
            return found
        begin = int(self.own_ends[number - 1]) if number else 0
        own = json.loads(self.own[begin : self.own_ends[number]].tobytes())
        return {**self.common[self.layout[number]], **own}

    def packed(self, number: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Table `number` of a ColumnFile: an item of its head's "tables", and arrays."""
        layouts = [[layout.names, layout.encodings, layout.sizes] for layout in self.layouts]
        head = {"folder": self.folder, "layouts": layouts, "common": self.common}
        return head, {f"{number}/{column}": getattr(self, column) for column in _COLUMNS}

    @classmethod
    def unpacked(cls, file: ColumnFile, number: int) -> ShardTable:
        """The inverse of `packed`; the arrays stay in the file."""
        head = file.head["tables"][number]
        return cls(
            folder=head["folder"],
            layouts=[ShardLayout(*map(tuple, layout)) for layout in head["layouts"]],
            common=head["common"],
            number=number,
            **{column: file[f"{number}/{column}"] for column in _COLUMNS},
        )


class Shards(Sequence[ShardSpec]):
    """The concatenated shards of several tables.

    Attributes:
        tables: As given.
        starts: int64 (tables + 1,), number of each table's first shard, and the total.
        samples, nbytes: int64 (shards,).
    """

    def __init__(self, tables: Sequence[ShardTable]):
        self.tables = tables
        self.starts = np.cumsum([0, *map(len, tables)])
        self.samples: NDArray[np.int64] = np.concatenate([table.samples for table in tables])
        self.nbytes: NDArray[np.int64] = np.concatenate([table.nbytes for table in tables])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        table, of_table = self.place(number % len(self))
        return self.tables[table][of_table]

    def __iter__(self) -> Iterator[ShardSpec]:
        return chain.from_iterable(self.tables)

    @property
    def numbers(self) -> list[int]:
        """Numbers of the tables in their file."""
        return [table.number for table in self.tables]

    def place(self, number: int) -> tuple[int, int]:
        """The table of a shard, and its number in it."""
        table = int(np.searchsorted(self.starts, number, side="right")) - 1
        return table, int(number - self.starts[table])

    def contents(self) -> Iterator[list[tuple[str, int]]]:
        """Digest and samples of every shard, in blocks of some thousands."""
        for table in self.tables:
            for at in range(0, len(table), _AT_ONCE):
                part = slice(at, at + _AT_ONCE)
                digests = [digest.decode() for digest in table.digest[part].tolist()]
                yield list(zip(digests, table.samples[part].tolist(), strict=True))


def _layouts(entries: Iterable[dict[str, Any]]) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
    """Layout index of each entry, int32 (shards,), and the common fields of each layout."""
    commons: list[dict[str, Any]] = []
    number, last, which = dict[str, int](), -1, list[int]()
    for entry in entries:
        common = {key: value for key, value in entry.items() if key not in _OWN}
        if last < 0 or common != commons[last]:
            last = number.setdefault(json.dumps(common, sort_keys=True), len(commons))
            if last == len(commons):
                commons.append(common)
        which.append(last)
    return np.array(which, np.int32), commons


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
