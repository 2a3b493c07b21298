"""Tiny models of the official classes, saved as the official checkpoints are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DIM, DINO, IMAGE, SD3, SD35, TOKENS, VAE, shake

import stamo_dist.models  # noqa: F401 (must precede transformers)

from diffusers import AutoencoderKL, SD3Transformer2DModel  # isort: skip
from transformers import Dinov2Config, Dinov2Model  # isort: skip

from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe import schema


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
