"""MDS shards that never split an episode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import stamo_dist._torchvision  # noqa: F401  # isort: skip  must precede streaming
from streaming import MDSWriter

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

    def write_episode(self, samples: Iterable[dict[str, Any]]) -> None:
        """Write all samples of one episode into one shard.

        Raises:
            DataError: The episode is larger than MDS' 4 GiB shards.
        """
        encoded = [self.encode_sample(sample) for sample in samples]
        size = sum(map(len, encoded)) + self.extra_bytes_per_sample * len(encoded)
        if size + self.extra_bytes_per_shard >= 2**32:
            raise DataError(f"the episode takes {size} bytes, more than the 4 GiB of one shard")
        if self.new_samples and self.new_shard_size + size > self.shard_bytes:
            self.flush_shard()
            self._reset_cache()
        self.new_samples += encoded
        self.new_shard_size += size
