"""The same JPEGs in every format that the loader is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import simplejpeg

SHARDS = 8


def decode(jpeg: Any, out: np.ndarray | None = None) -> np.ndarray:
    return simplejpeg.decode_jpeg(jpeg, "RGB", True, False, 0, 0, 1, out)


def libero_frames(path: Path, n: int, size: int) -> Iterator[bytes]:
    """`n` distinct JPEGs (quality 95): windows of simulated camera frames, enlarged, with a little sensor noise."""
    with h5py.File(path) as file:
        views = [demo["obs"][v][:] for demo in file["data"].values() for v in ("agentview_rgb", "eye_in_hand_rgb")]
    from PIL import Image

    frames = np.concatenate(views)
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 2, (size, size, 3)).astype(np.float32) for _ in range(16)]
    for i in range(n):
        frame = Image.fromarray(frames[i % len(frames)][::-1])
        x, y = rng.uniform(0, 0.15 * frame.width, 2)
        side = 0.85 * frame.width
        big = np.asarray(frame.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)))
        noisy = (big + noise[rng.integers(len(noise))]).clip(0, 255).astype(np.uint8)
        yield simplejpeg.encode_jpeg(noisy, 95, colorsubsampling="420")


def shard_frames(folder: Path, n: int) -> Iterator[bytes]:
    """The first `n` JPEGs of a converted SOURCE/SPLIT/CAMERA."""
    from stamo_dist.data.shards import MappedShard
    from stamo_dist.data.sources import open_camera, open_source

    camera, split = folder.name, folder.parent.name
    for spec in open_camera(open_source(str(folder.parent.parent)), split, camera).shards:
        shard = MappedShard(spec)
        for i in range(min(n, spec.samples)):
            yield bytes(shard.bytes(i, "image"))
        n -= min(n, spec.samples)


def write_mds(root: Path, jpegs: list[bytes], size: int, shards: int = SHARDS) -> None:
    """A source of one camera, one episode a shard."""
    import stamo_dist._streaming  # noqa: F401, I001  must precede streaming
    from streaming.base.format import MDSWriter
    from stamo_dist.data.schema import EPISODES, MANIFEST, Episode, Manifest, Split, columns

    table = list[str]()
    rest = {
        "action": np.zeros(7, np.float32), "proprio": np.zeros(9, np.float32), "instruction": "", "source": "s",
        "camera": "front", "convention": "",
    }  # fmt: skip
    layout = columns(action=7, original_action=0, proprio=9)
    with MDSWriter(out=str(root / "train" / "front"), columns=layout, size_limit=None) as writer:
        for e, part in enumerate(np.array_split(np.arange(len(jpegs)), shards)):
            if e:
                writer.flush_shard()
                writer._reset_cache()
            table.append(Episode(id=str(e), start=int(part[0]), length=len(part)).model_dump_json())
            for t, i in enumerate(part):
                moment = {"image": jpegs[i], "t": t, "length": len(part), "time": t / 20, "episode": str(e)}
                writer.write({**moment, **rest})
    manifest = Manifest(
        name="s", source_format="benchmark", image_size=size, cameras=["front"], rate_hz=20, action_dim=7,
        splits={"train": Split(episodes=shards, frames=len(jpegs))}, proprio_dim=9, convention="",
    )  # fmt: skip
    (root / "train" / EPISODES).write_text("\n".join(table) + "\n")
    (root / MANIFEST).write_text(manifest.model_dump_json())


def write_webdataset(root: Path, jpegs: list[bytes]) -> None:
    import webdataset

    root.mkdir()
    per_shard = -(-len(jpegs) // SHARDS)
    for s in range(SHARDS):
        with webdataset.TarWriter(str(root / f"{s:05}.tar")) as writer:
            for i in range(s * per_shard, min(len(jpegs), (s + 1) * per_shard)):
                writer.write({"__key__": f"{i:08}", "jpg": jpegs[i]})


def _pick(jpegs: list[bytes], i: int) -> dict[str, bytes]:
    return {"image": jpegs[i]}


def write_litdata(root: Path, jpegs: list[bytes]) -> None:
    import litdata

    litdata.optimize(
        fn=partial(_pick, jpegs), inputs=list(range(len(jpegs))), output_dir=str(root), num_workers=1,
        chunk_bytes=sum(map(len, jpegs)) // SHARDS + 1, verbose=False,
    )  # fmt: skip


def write_hdf5(path: Path, jpegs: list[bytes]) -> None:
    with h5py.File(path, "w") as file:
        column = file.create_dataset("jpeg", (len(jpegs),), h5py.vlen_dtype(np.uint8))
        for i, jpeg in enumerate(jpegs):
            column[i] = np.frombuffer(jpeg, np.uint8)
