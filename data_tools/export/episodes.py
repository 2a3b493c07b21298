"""Walking through the episodes of a converted source, camera by camera, in stored order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_tools.look.check_table import Table
from data_tools.look.columns import ColumnShard
from data_tools.look.each_shard import shards_of
from data_tools.stores.store import Store, at_hand
from stamo_dist.data.schema import EPISODES, Episode, Manifest
from stamo_dist.errors import DataError


@dataclass(frozen=True)
class StoredEpisode:
    """An episode of one camera in the shard that holds it; readable while it is the current one of `walk`."""

    split: str
    about: Episode
    shard: ColumnShard
    first: int  # its first sample in the shard

    def vectors(self, column: str) -> NDArray[np.generic]:
        """A column of numbers, (length, D)."""
        return self.shard.vectors(column)[self.first : self.first + self.about.length]

    def frames(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Its frames, (size, size, 3) RGB; the same memory each time.

        Raises:
            DataError: One is no whole JPEG of that size.
        """
        frame = np.empty((size, size, 3), np.uint8)
        for t in range(self.about.length):
            self.shard.shard.frame(self.first + t, frame)
            yield frame


def walk(store: Store, manifest: Manifest, camera: str) -> Iterator[StoredEpisode]:
    """The episodes of all splits.

    Raises:
        DataError: Files are missing or damaged, or hold other episodes than the episode table.
    """
    for split, size in manifest.splits.items():
        with at_hand(store, f"{split}/{EPISODES}") as path:
            try:
                table = list(Table(path).lines())
            except DataError as e:
                raise DataError(f"{store.url}/{split}/{EPISODES}: {e}; `stamo data check` the source") from None
        frames = sum(episode.length for episode in table)
        if (len(table), frames) != (size.episodes, size.frames):
            raise DataError(
                f"{store.url}: manifest.json has {size.episodes} episodes of {size.frames} frames in {split}, "
                f"{split}/{EPISODES} {len(table)} of {frames}; `stamo data check` the source, and convert it again"
            )
        waiting, begin = iter(table), 0
        episode = next(waiting, None)
        for indexed in shards_of(store, split, camera):
            if episode is None:
                break
            end = begin + indexed.samples
            with at_hand(store, f"{split}/{camera}/{indexed.name}") as path:
                shard = ColumnShard(indexed.spec(path))
                while episode is not None and begin <= episode.start and episode.start + episode.length <= end:
                    yield StoredEpisode(split, episode, shard, episode.start - begin)
                    episode = next(waiting, None)
            begin = end
        if episode is not None:
            where = f"{store.url}/{split}/{camera}"
            raise DataError(
                f"{where}: none of its shards has all of episode {episode.id}; `stamo data check` the source"
            )
