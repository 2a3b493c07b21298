"""Data and a small tokenizer made on the spot: what a machine needs that has nothing but the packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg
import torch
from frames import write_mds

import stamo_dist.models  # noqa: F401  # isort: skip  must precede diffusers
from diffusers import AutoencoderKL

RECIPE = """\
name: toy
run_dir: {root}/run
data:
  image_size: {size}
  workers: 0
  sources: {{s: {{path: {root}/shards}}}}
model:
  encoder:
    image_size: {size}
    train: true
    config: {{patch_size: 8, hidden_size: {width}, num_hidden_layers: 2, num_attention_heads: {heads}}}
  compressor: {{tokens: 2, dim: {width}, width: {width}, depth: 1, heads: {heads}}}
  decoder:
    config: {{patch_size: 1, num_layers: 2, num_attention_heads: {heads}, attention_head_dim: {head}}}
  vae: {{weights: {root}/vae}}
train:
  steps: 6
  global_batch: 8
  micro_batch: 4
  precision: fp32
  ema: 0.9
  checkpoint: {{every: 3, keep: 9, background: true}}
optimizer: {{lr: 1e-3, warmup_steps: 2}}
flow: {{sampler_steps: 2}}
"""


def jpegs(n: int, size: int) -> list[bytes]:
    """Distinct frames: a square over a coloured slope, with a little noise."""
    rng, found = np.random.default_rng(0), []
    slope = np.linspace(0, 90, size, dtype=np.float32)
    for i in range(n):
        frame = rng.integers(40, 120, 3) + slope[:, None, None] + rng.normal(0, 2, (size, size, 3))
        x, y = rng.integers(0, size - size // 4, 2)
        frame[y : y + size // 4, x : x + size // 4] = (255 * i // n, 200, 30)
        found.append(simplejpeg.encode_jpeg(frame.clip(0, 255).astype(np.uint8), 95, colorsubsampling="420"))
    return found


def make(root: Path, *, frames: int = 48, size: int = 32, head: int = 16, shards: int = 4) -> Path:
    """Frames, a random VAE and a recipe for them, which is returned."""
    root.mkdir(parents=True, exist_ok=True)
    write_mds(root / "shards", jpegs(frames, size), size, shards)
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=size,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0,
    ).save_pretrained(root / "vae")  # fmt: skip
    recipe = root / "toy.yaml"
    recipe.write_text(RECIPE.format(root=root, size=size, head=head, heads=2, width=2 * head))
    return recipe
