"""A small source in the project's shard layout: a square that moves over a coloured ground."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from stamo_dist import _streaming  # noqa: F401  must precede streaming
from stamo_dist.data.schema import EPISODES, MANIFEST, Episode, Manifest, Split, columns


def toy_frame(episode: int, t: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(episode)
    frame = np.full((size, size, 3), rng.integers(40, 200, 3), np.uint8)
    x, y = (rng.integers(0, size // 2, 2) + np.array([t, t // 2])) % (size - size // 4)
    frame[y : y + size // 4, x : x + size // 4] = 255 - frame[0, 0]
    return frame


def make_source(
    root: Path, name: str, *, episodes: int = 4, length: int = 12, size: int = 32,
    cameras: tuple[str, ...] = ("front",), splits: tuple[str, ...] = ("train", "val"), shard_bytes: int = 40_000,
    action: Callable[[int, int], Sequence[float]] = lambda episode, t: [t] * 3, compression: str | None = None,
) -> Path:  # fmt: skip
    """Write one source under `root`/`name` and return its folder; `action` gives three numbers."""
    from streaming.base.format import MDSWriter

    source = root / name
    first = sum(map(ord, name))
    layout = columns(action=3, original_action=0, proprio=2)
    for s, split in enumerate(splits):
        table = []
        for c, camera in enumerate(cameras):
            folder = source / split / camera
            with MDSWriter(out=str(folder), columns=layout, size_limit=shard_bytes, compression=compression) as writer:
                for e in range(episodes):
                    for t in range(length):
                        frame = toy_frame(first + 100 * s + 1000 * c + e, t, size)
                        writer.write(
                            {
                                "image": simplejpeg.encode_jpeg(frame, quality=95),
                                "episode": f"{name}-{split}-{e}",
                                "t": t,
                                "length": length,
                                "time": t / 10,
                                "action": np.array(action(e, t), np.float32),
                                "proprio": np.zeros(2, np.float32),
                                "instruction": "move the square",
                                "source": name,
                                "camera": camera,
                                "convention": "toy",
                            }
                        )
        for e in range(episodes):
            table.append(Episode(id=f"{name}-{split}-{e}", start=e * length, length=length).model_dump_json())
        (source / split / EPISODES).write_text("\n".join(table) + "\n")
    manifest = Manifest(
        name=name, source_format="toy", image_size=size, cameras=list(cameras), rate_hz=10, action_dim=3, proprio_dim=2,
        convention="toy", splits={s: Split(episodes=episodes, frames=episodes * length) for s in splits},
    )  # fmt: skip
    (source / MANIFEST).write_text(manifest.model_dump_json())
    return source


RECIPE = """\
name: toy
run_dir: {run}
data:
  image_size: 32
  workers: {workers}
  augment: {{brightness: 0.1}}
  sources:
    a: {{path: {shards}/a, weight: 2}}
    b: {{path: {shards}/b}}
model:
  encoder:
    image_size: 32
    train: true
    config: {{patch_size: 8, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2}}
  compressor: {{tokens: 2, dim: 32, width: 32, depth: 1, heads: 2}}
  decoder:
    config: {{patch_size: 1, num_layers: 2, num_attention_heads: 2, attention_head_dim: 16}}
  vae:
    weights: {vae}
train:
  steps: 20
  global_batch: 8
  micro_batch: 2
  precision: fp32
  checkpoint: {{every: 10, keep: 2}}
optimizer: {{lr: 1e-3, warmup_steps: 2}}
flow: {{sampler_steps: 2}}
strategy: {{name: {strategy}}}
"""


def make_vae(folder: Path) -> Path:
    """A random AutoencoderKL that turns 32 px into 4 × 8 × 8."""
    import torch

    import stamo_dist.models  # noqa: F401  # isort: skip  must precede diffusers
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_recipe(path: Path, shards: Path, vae: Path, *, strategy: str = "ddp", workers: int = 0) -> Path:
    """Write the toy tokenizer recipe; its run folder lies beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = path.parent / "run"
    path.write_text(RECIPE.format(run=run, shards=shards, vae=vae, strategy=strategy, workers=workers))
    return path
