"""Small sources in the project's shard layout: every frame has a colour of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from stamo_dist import _streaming  # noqa: F401  # isort: skip  must precede streaming
from streaming.base.format import MDSWriter

from stamo_dist.data.schema import EPISODES, MANIFEST, Episode, Manifest, Split, columns
from stamo_dist.recipe.data import Data, SourceConfig

SIZE = 32


def colour(source: str, camera: str, episode: int, t: int) -> np.ndarray:
    """The colour of one frame, uint8 (3,)."""
    digest = hashlib.sha256(f"{source} {camera} {episode} {t}".encode()).digest()
    return np.frombuffer(digest[:3], np.uint8)


def write_source(
    folder: Path,
    *,
    lengths: Sequence[int] = (7, 12, 5, 9),
    cameras: Sequence[str] = ("front",),
    splits: Sequence[str] = ("train",),
    shard_bytes: int = 5_000,
    actions: int = 2,
    **writer_options: Any,
) -> Path:
    """Write a source of `len(lengths)` episodes per split in several shards; returns its folder."""
    options = {"hashes": ["sha256"], **writer_options}
    layout = columns(action=actions, original_action=0, proprio=1)
    for split in splits:
        starts = np.cumsum([0, *lengths])
        for camera in cameras:
            out = folder / split / camera
            with MDSWriter(out=str(out), columns=layout, size_limit=None, **options) as writer:
                for e, length in enumerate(lengths):
                    if writer.new_shard_size > shard_bytes:  # a shard holds whole episodes
                        writer.flush_shard()
                        writer._reset_cache()
                    for t in range(length):
                        frame = np.tile(colour(folder.name, camera, e, t), (SIZE, SIZE, 1))
                        writer.write(
                            {
                                "image": simplejpeg.encode_jpeg(frame, 95, colorsubsampling="444"),
                                "episode": f"{folder.name}-{e}",
                                "t": t,
                                "length": length,
                                "time": t / 10,
                                **({"action": np.array([e, t], np.float32)} if actions else {}),
                                "proprio": np.array([t], np.float32),
                                "instruction": "push",
                                "source": folder.name,
                                "camera": camera,
                                "convention": "made here",
                            }
                        )
        lines = [
            Episode(id=f"{folder.name}-{e}", start=int(s), length=n).model_dump_json()
            for e, (s, n) in enumerate(zip(starts[:-1], lengths, strict=True))
        ]
        (folder / split / EPISODES).write_text("\n".join(lines) + "\n")
    frames = sum(lengths)
    manifest = Manifest(
        name=folder.name, source_format="made here", image_size=SIZE, cameras=list(cameras),
        splits={split: Split(episodes=len(lengths), frames=frames) for split in splits},
        rate_hz=10, action_dim=actions, proprio_dim=1, convention="made here",
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def make_data(sources: dict[str, SourceConfig], **changes: Any) -> Data:
    """A `data` section over `sources`, small enough for tests."""
    options: dict[str, Any] = {"image_size": SIZE, "workers": 0}
    return Data(sources=sources, **{**options, **changes})
