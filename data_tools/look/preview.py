"""`stamo data preview`: one image of a source that shows whether a camera is mirrored or upside down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.look.check_table import Table
from data_tools.look.columns import ColumnShard, IndexedShard
from data_tools.look.each_shard import agreed_shards
from data_tools.look.preview_page import PreviewedEpisode, draw
from data_tools.look.stats import TRAIN
from data_tools.stores.open import open_store
from data_tools.stores.store import Store, at_hand
from data_tools.stores.sync import fetch_manifest
from stamo_dist.data.schema import EPISODES, Episode, Manifest
from stamo_dist.errors import DataError

#: Rows of the contact sheet by default.
ROWS = 12


def preview(
    source: str, out: Path | None = None, *, split: str | None = None, episodes: int | None = None, frames: int = 8
) -> Path:
    """Draw a source.

    Args:
        source: Folder or URL.
        out: PNG to write, or a folder to write preview_NAME.png in, made if it has no ending; here when omitted.
        split: Which split; when omitted train, or the first if there is no train.
        episodes: How many episodes, evenly spread over the split; as many as fit on a page when omitted.
        frames: How many frames of each in a film strip, and half as many again on the contact sheet.

    Returns:
        The path of the image.

    Raises:
        DataError: The source is missing or damaged, or the picture cannot be written.
    """
    if (episodes is not None and episodes < 1) or frames < 2:
        raise DataError("--episodes must be at least 1 and --frames at least 2")
    store = open_store(source)
    manifest, _ = fetch_manifest(store)
    if split is None:
        split = TRAIN if TRAIN in manifest.splits else next(iter(manifest.splits), "")
    if split not in manifest.splits:
        raise DataError(f"{source}: has no split {split!r}, only {', '.join(manifest.splits) or 'none'}")
    path = out or Path()
    if path.is_dir() or not path.suffix:
        path /= f"preview_{manifest.name}.png"
    elif path.suffix.lower() != ".png":
        raise DataError(f"{path}: the picture is a PNG; name it .png")
    cameras = len(manifest.cameras)
    chosen = _choose(store, manifest, split, episodes or min(6, max(2, ROWS // cameras)))
    shards = {camera: agreed_shards(store, manifest, split, camera) for camera in manifest.cameras}

    def read(some: list[Episode], count: int) -> list[PreviewedEpisode]:
        return [_episode(store, manifest, split, shards, episode, count) for episode in some]

    strips = [] if not manifest.action_dim else [chosen[0]] if cameras > 2 else chosen[:: max(1, len(chosen) // 2)][:2]
    draw(manifest, split, read(chosen, frames * 3 // 2), read(strips, frames), path)
    return path


def _choose(store: Store, manifest: Manifest, split: str, count: int) -> list[Episode]:
    """Episodes evenly spread over the split."""
    total = manifest.splits[split].episodes
    wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    with at_hand(store, f"{split}/{EPISODES}") as path:
        try:
            episodes = [episode for n, episode in enumerate(Table(path).lines()) if n in wanted]
        except DataError as e:
            raise DataError(f"{store.url}/{split}/{EPISODES}: {e}; `stamo data check` it") from None
    if not episodes:
        raise DataError(f"{store.url}: split {split} has no episodes")
    return episodes


def _episode(
    store: Store, manifest: Manifest, split: str, shards: dict[str, list[IndexedShard]], episode: Episode, count: int
) -> PreviewedEpisode:
    times, actions = np.empty(0), np.empty((0, 0), np.float32)
    picked, images = np.empty(0, np.int64), {}
    size = manifest.image_size
    for camera in manifest.cameras:
        indexed, first = _locate(shards[camera], episode, f"{store.url}/{split}/{camera}")
        with at_hand(store, f"{split}/{camera}/{indexed.name}") as path:
            shard = ColumnShard(indexed.spec(path))
            if camera == manifest.cameras[0]:
                here = slice(first, first + episode.length)
                times = shard.vectors("time")[here, 0].astype(np.float64)
                picked = evenly(times, count)
                actions = shard.vectors("action")[here].astype(np.float32) if manifest.action_dim else actions
            images[camera] = np.empty((len(picked), size, size, 3), np.uint8)
            for image, t in zip(images[camera], picked.tolist(), strict=True):
                shard.shard.frame(first + t, image)
    return PreviewedEpisode(episode, times, picked, images, actions)


def _locate(shards: list[IndexedShard], episode: Episode, where: str) -> tuple[IndexedShard, int]:
    """The shard of an episode, and the episode's first sample in it."""
    begin = 0
    for shard in shards:
        if begin <= episode.start and episode.start + episode.length <= begin + shard.samples:
            return shard, episode.start - begin
        begin += shard.samples
    raise DataError(f"{where}: none of its shards has all of episode {episode.id}; `stamo data check` the source")


def evenly(times: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Distinct frame numbers nearest to `count` evenly spaced positions from first to last."""
    if len(times) == 1:
        return np.zeros(1, np.int64)
    grid = np.linspace(times[0], times[-1], count)
    right = np.searchsorted(times, grid).clip(1, len(times) - 1)
    return np.unique(np.where(grid - times[right - 1] <= times[right] - grid, right - 1, right))
