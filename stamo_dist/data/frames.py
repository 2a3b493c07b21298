"""Random access to the episodes of a converted source, for evaluation and the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.schema import Episode
from stamo_dist.data.shards import MappedShard, OpenShards
from stamo_dist.data.sources import DEFAULT_CACHE, open_camera, open_source
from stamo_dist.errors import DataError

_MAPPED = 64  # shards kept mapped; a training that shares the cache cannot remove them


class Episodes:
    """The episodes of one split as one camera saw them.

    Args:
        path: Folder or URL of the source.
        split: Which split, e.g. "heldout".
        camera: Which camera; the source's first when omitted.
        cache: Folder for remote shards.

    Attributes:
        episodes: list[Episode], in stored order.
        camera: Name of the camera.
        manifest: The source's.

    Raises:
        DataError: The source, split or camera is missing or damaged.
    """

    def __init__(
        self, path: str, split: str, camera: str | None = None, *, cache: str = DEFAULT_CACHE, growth: int | None = None
    ):
        source = open_source(path, cache, growth)
        self.manifest = source.manifest
        self.camera = source.manifest.cameras[0] if camera is None else camera
        self._shards = open_camera(source, split, self.camera)
        self._open = OpenShards(self._shards.shards, _MAPPED, self._shards.open)
        counts = np.array([shard.samples for shard in self._shards.shards])
        self._first = counts.cumsum() - counts
        self.episodes: list[Episode] = source.episodes(split)
        last = self.episodes[-1] if self.episodes else None
        if last is None or last.start + last.length != self._shards.frames:
            raise DataError(f"{path}: the episode table of {split} does not match its {self._shards.frames} frames")

    def __len__(self) -> int:
        return len(self.episodes)

    def frames(self, episode: int, ts: Sequence[int]) -> NDArray[np.uint8]:
        """Frames `ts` of an episode, uint8 (len(ts), H, W, 3), RGB.

        Raises:
            DataError: A t is outside the episode, or a frame cannot be decoded.
        """
        size = self.manifest.image_size
        out = np.empty((len(ts), size, size, 3), np.uint8)
        for row, t in zip(out, ts, strict=True):
            shard, sample = self._locate(episode, t)
            shard.frame(sample, row)
        return out

    def actions(self, episode: int, ts: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Actions taken at frames `ts` (all when omitted), float32 (len(ts), action_dim)."""
        return self._vectors("action", episode, ts)

    def original_actions(self, episode: int, ts: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Actions as the dataset stored them at frames `ts` (all when omitted), float32 (len(ts), A)."""
        return self._vectors("original_action", episode, ts)

    def proprio(self, episode: int, ts: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Proprioception at frames `ts` (all when omitted), float32 (len(ts), proprio_dim)."""
        return self._vectors("proprio", episode, ts)

    def _vectors(self, column: str, episode: int, ts: Sequence[int] | None) -> NDArray[np.float32]:
        ts = range(self.episodes[episode].length) if ts is None else ts
        rows = []
        for t in ts:
            shard, sample = self._locate(episode, t)
            rows.append(shard.sample(sample, [column])[column])
        return np.stack(rows) if rows else np.empty((0, 0), np.float32)

    def _locate(self, episode: int, t: int) -> tuple[MappedShard, int]:
        """The shard and the sample within it of frame `t`."""
        found = self.episodes[episode]
        if not 0 <= t < found.length:
            raise DataError(f"episode {found.id} has frames 0 to {found.length - 1}, not {t}")
        number = int(np.searchsorted(self._first, found.start + t, side="right")) - 1
        return self._open[number], found.start + t - int(self._first[number])
