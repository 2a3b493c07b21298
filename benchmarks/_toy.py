"""Data, a tokenizer and a policy made on the spot: what a machine needs that has nothing but the packages.

    python benchmarks/_toy.py FOLDER [--tiny]     # FOLDER/toy.yaml, a tokenizer's, and FOLDER/policy.yaml

Without --tiny the tokenizer has 0.6 B parameters, so that a GPU has something to do, and the policy is the 7 B.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import yaml
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


#: What the large one has in place of it: a DiT of the full width, and a frozen part of the full size.
LARGE = {
    "train": {"precision": "bf16", "global_batch": 32, "micro_batch": 32, "compile": True},
    "model": {
        "encoder": {"image_size": 224, "train": True,
                    "config": {"patch_size": 14, "hidden_size": 768, "num_hidden_layers": 12,
                               "num_attention_heads": 12}},
        "compressor": {"tokens": 2, "dim": 1024, "width": 1024, "depth": 4, "heads": 16},
        "decoder": {"config": {"patch_size": 2, "num_layers": 6, "num_attention_heads": 24, "attention_head_dim": 64}},
    },
    "data": {"workers": 4},
}  # fmt: skip
POLICY = """\
name: policy
stage: policy
run_dir: {root}/policy
data: {{image_size: {size}, horizon: 1, sources: {{s: {{path: none}}}}}}
policy: {config}
train: {{steps: 1, global_batch: 8, precision: {precision}}}
"""
SMALL = {
    "image_sizes": [56, 56], "timm_kwargs": [{"embed_dim": 32, "depth": 3, "num_heads": 2}] * 2,
    "text_config": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "num_key_value_heads": 4},
}  # fmt: skip


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


def make(root: Path, *, frames: int = 48, size: int = 32, head: int = 16, large: bool = False) -> Path:
    """Frames, a random VAE and a recipe for them, which is returned. `head`: of attention, where it is not large."""
    root.mkdir(parents=True, exist_ok=True)
    write_mds(root / "shards", jpegs(frames, size), size, 4)
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
             "mid_block_add_attention": False}  # fmt: skip
    whole = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    config = whole if large else small
    blocks = len(config["block_out_channels"])
    AutoencoderKL(
        **config, down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        sample_size=size, scaling_factor=1.0, shift_factor=0.0,
    ).save_pretrained(root / "vae")  # fmt: skip
    content = yaml.safe_load(RECIPE.format(root=root, size=size, head=head, heads=2, width=2 * head))
    if large:
        for section, values in LARGE.items():
            content[section].update(values)
        content["model"]["vae"] = {"weights": str(root / "vae")}
    recipe = root / "toy.yaml"
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def make_policy(root: Path, *, large: bool) -> Path:
    """A recipe of a policy with random weights."""
    config = {"vision": "fused", "config": {} if large else SMALL}
    precision, size = ("bf16", 224) if large else ("fp32", 56)
    recipe = root / "policy.yaml"
    recipe.write_text(POLICY.format(root=root, size=size, config=json.dumps(config), precision=precision))
    return recipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    print(make(options.folder, **({} if options.tiny else {"frames": 512, "size": 256, "large": True})))
    print(make_policy(options.folder, large=not options.tiny))
