"""Sizes of the official classes that a test can afford."""

from __future__ import annotations

from typing import Any

import torch

IMAGE, TOKENS, DIM = 32, 2, 24

DINO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 70,
}
SD3: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "caption_projection_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "pos_embed_max_size": 12,
}
SD35: dict[str, Any] = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": [0]}
VAE: dict[str, Any] = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": IMAGE,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


def shake(module: torch.nn.Module) -> torch.nn.Module:
    """Random values everywhere: zero biases and unit gains would hide a key that was not loaded."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.1)
    return module.eval()
