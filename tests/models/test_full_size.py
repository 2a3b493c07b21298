"""The full-size tokenizer, built on the meta device: parameters and arithmetic against the published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.plan.registry import PAPER
from stamo_dist.recipe import schema

DINOV2_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 518,
}
SD3_MEDIUM, SD3_VAE = PAPER["decoder"], PAPER["vae"]


def build(image_size: int) -> Tokenizer:
    cfg = schema.Model(
        encoder=schema.EncoderConfig(config=DINOV2_LARGE, train=True),
        decoder=schema.DecoderConfig(config=SD3_MEDIUM),
        vae=schema.VAEConfig(config=SD3_VAE),
    )
    with torch.device("meta"):
        return Tokenizer.from_config(cfg, schema.Flow(), image_size)


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_parameters() -> None:
    with torch.device("meta"):
        official = SD3Transformer2DModel(**SD3_MEDIUM, joint_attention_dim=4096, pooled_projection_dim=2048)
    tokenizer = build(256)
    assert millions(official) == pytest.approx(2028, abs=0.5)
    # The context embedder takes 1024 instead of 4096 inputs; nothing else differs.
    assert millions(official) - millions(tokenizer.trained.decoder) == pytest.approx(3072 * 1536 / 1e6)
    shapes = {k: v.shape for k, v in tokenizer.trained.decoder.transformer.state_dict().items()}
    differing = [k for k, v in official.state_dict().items() if v.shape != shapes.pop(k)]
    assert (differing, shapes) == (["context_embedder.weight"], {})
    assert millions(tokenizer.encoder) == pytest.approx(304, abs=1)
    assert tokenizer.latent_shape == (16, 32, 32)


@pytest.mark.parametrize(("image_size", "decoder", "vae"), [(256, 0.362, 0.273), (512, 1.551, 1.118)])
def test_arithmetic(image_size: int, decoder: float, vae: float) -> None:
    tokenizer = build(image_size)
    flops = tokenizer.flops()
    assert flops.decoder / 1e12 == pytest.approx(decoder, rel=0.02)
    assert flops.vae_encoder / 1e12 == pytest.approx(vae, rel=0.02)
    assert flops.encoder / 1e12 == pytest.approx(0.162, rel=0.02)
    # Per token and layer: 12·width² multiply-adds; the last layer updates the queries only.
    layer = 2 * 258 * 12 * 1024**2
    assert 3 * layer < flops.compressor < 4 * layer
    assert tokenizer.flops_per_sample(cached_latents=True) == (flops.encoder + flops.compressor + flops.decoder, 0)
    assert tokenizer.flops_per_sample()[1] == flops.vae_encoder
    assert tokenizer.vae.flops_per_sample() > 2 * flops.vae_encoder  # the decoder has one more layer a level
