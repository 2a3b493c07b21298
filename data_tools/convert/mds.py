"""MDS shards that never split an episode."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import stamo_dist._streaming  # noqa: F401  # isort: skip  must precede streaming
from streaming.base.format import MDSWriter
from streaming.base.format.mds.encodings import mds_encode

from stamo_dist.errors import DataError


class EpisodeWriter(MDSWriter):
    """An MDSWriter that starts a new shard before an episode that would not fit into the open one.

    Args:
        out: Folder to create.
        columns: Column → MDS encoding.
        shard_bytes: Size at which a shard is closed; a longer episode gets a larger shard of its own.
    """

    def __init__(self, out: Path, columns: Mapping[str, str], shard_bytes: int):
        super().__init__(out=str(out), columns=dict(columns), hashes=["sha256"], size_limit=None)
        self.shard_bytes = shard_bytes

    def encode(self, shared: Mapping[str, Any], each: Mapping[str, Sequence[bytes] | np.ndarray]) -> list[bytes]:
        """All samples of one episode encoded as `encode_sample` would, without building a dict per sample.

        Args:
            shared: Columns with one value for the whole episode.
            each: Columns with one value per frame: bytes, or an array whose rows have the column's type.

        Raises:
            DataError: The episode is larger than MDS' 4 GiB shards.
        """
        length = len(next(iter(each.values())))
        table = [
            [mds_encode(encoding, shared[name])] * length if name in shared else _rows(each[name])
            for name, encoding in zip(self.column_names, self.column_encodings, strict=True)
        ]
        varying = [column for column, size in zip(table, self.column_sizes, strict=True) if size is None]
        sizes = np.array([[len(value) for value in column] for column in varying], "<u4")
        encoded = list(map(b"".join, zip(_rows(sizes.T), *table, strict=True)))
        if (size := self._size(encoded) + self.extra_bytes_per_shard) >= 2**32:
            raise DataError(f"the episode takes {size} bytes, more than the 4 GiB of one shard")
        return encoded

    def write_episode(self, encoded: list[bytes]) -> None:
        """Write all samples of one episode into one shard."""
        size = self._size(encoded)
        if self.new_samples and self.new_shard_size + size > self.shard_bytes:
            self.flush_shard()
            self._reset_cache()
        self.new_samples += encoded
        self.new_shard_size += size

    def flush_shard(self) -> None:
        """Write the same bytes as MDSWriter's method, hashing and writing sample by sample instead of joining first."""
        head = 4 * (len(self.new_samples) + 2) + len(self.config_data)  # the number of samples, offsets, the layout
        offsets = np.cumsum([head, *map(len, self.new_samples)], dtype=np.uint32)
        name, _ = self._name_next_shard()
        digest = hashlib.sha256()
        with (Path(self.local) / name).open("wb") as file:
            for part in (
                np.uint32(len(self.new_samples)).tobytes(),
                offsets.tobytes(),
                self.config_data,
                *self.new_samples,
            ):
                digest.update(part)
                file.write(part)
        written = {"basename": name, "bytes": int(offsets[-1]), "hashes": {"sha256": digest.hexdigest()}}
        self.shards.append(
            {"samples": len(self.new_samples), "raw_data": written, "zip_data": None, **self.get_config()}
        )

    def _size(self, encoded: list[bytes]) -> int:
        return sum(map(len, encoded)) + self.extra_bytes_per_sample * len(encoded)


def _rows(values: Sequence[bytes] | np.ndarray) -> Sequence[bytes]:
    """The bytes of each row."""
    if not isinstance(values, np.ndarray):
        return values
    block = values.tobytes()
    step = len(block) // len(values)
    return [block[i : i + step] for i in range(0, len(block), step)]
