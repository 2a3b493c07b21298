"""Tiny models of the official classes, saved as the official checkpoints are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stamo_dist.models  # noqa: F401 (must precede transformers)

from diffusers import AutoencoderKL, SD3Transformer2DModel  # isort: skip
from transformers import Dinov2Config, Dinov2Model  # isort: skip

from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe import schema

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


@pytest.fixture(scope="session")
def configs() -> dict[str, dict[str, Any]]:
    return {"dino": DINO, "sd3": SD3, "sd3.5": SD35, "vae": VAE}


@pytest.fixture
def sd3() -> Callable[..., SD3Transformer2DModel]:
    def build(config: dict[str, Any] = SD3, joint: int = 40, pooled: int = 20) -> SD3Transformer2DModel:
        return shake(SD3Transformer2DModel(**config, joint_attention_dim=joint, pooled_projection_dim=pooled))

    return build


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dino/`, and `sd3/` in Stable Diffusion 3's layout (transformer/, vae/)."""
    root = tmp_path_factory.mktemp("official")
    shake(Dinov2Model(Dinov2Config(**DINO))).save_pretrained(root / "dino")
    transformer = SD3Transformer2DModel(**SD3, joint_attention_dim=40, pooled_projection_dim=20)
    shake(transformer).save_pretrained(root / "sd3" / "transformer")
    shake(AutoencoderKL(**VAE)).save_pretrained(root / "sd3" / "vae")
    return root


@pytest.fixture
def model_cfg(official: Path) -> Callable[..., schema.Model]:
    """A recipe's model section on the official weights, or random ones with a joint encoder."""

    def build(weights: bool = True, **decoder: Any) -> schema.Model:
        sd3 = str(official / "sd3")
        return schema.Model(
            encoder=schema.EncoderConfig(weights=str(official / "dino"), image_size=42)
            if weights
            else schema.EncoderConfig(config=DINO, image_size=42, train=True),
            compressor=schema.CompressorConfig(tokens=TOKENS, dim=DIM, width=32, depth=2, heads=2),
            decoder=schema.DecoderConfig(weights=sd3) if weights else schema.DecoderConfig(config={**SD3, **decoder}),
            vae=schema.VAEConfig(weights=sd3) if weights else schema.VAEConfig(config=VAE),
        )

    return build


@pytest.fixture
def tokenizer(model_cfg: Callable[..., schema.Model]) -> Callable[..., Tokenizer]:
    def build(weights: bool = True) -> Tokenizer:
        torch.manual_seed(0)
        return Tokenizer.from_config(model_cfg(weights), schema.Flow(sampler_steps=3), IMAGE)

    return build


@pytest.fixture
def frames() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, IMAGE, IMAGE, 3), dtype=torch.uint8, generator=generator)
