from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from stamo_dist.errors import RecipeError
from stamo_dist.models.vae import VAE
from stamo_dist.recipe import schema


def test_latents_and_images_are_those_of_the_official_pipeline(official: Path, frames: torch.Tensor) -> None:
    theirs = AutoencoderKL.from_pretrained(official / "sd3", subfolder="vae").eval()
    ours = VAE.from_config(schema.VAEConfig(weights=str(official / "sd3")), 32).eval()
    pixels = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        mean = theirs.encode(pixels).latent_dist.mean
        z0 = ours.encode(frames)
        torch.testing.assert_close(z0, (mean - 0.0609) * 1.5305, atol=1e-5, rtol=1e-4)
        decoded = theirs.decode(z0 / 1.5305 + 0.0609).sample
        torch.testing.assert_close(ours.decode(z0), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-4)
    assert ours.latent_shape == z0.shape[1:] == (4, 8, 8)


def test_sampled_latents_take_the_callers_noise(official: Path, frames: torch.Tensor) -> None:
    vae = VAE.from_config(schema.VAEConfig(weights=str(official / "sd3"), latent="sample"), 32)
    noise = torch.randn(3, *vae.latent_shape)
    with torch.no_grad():
        mean, plus, minus = (vae.encode(frames, n) for n in (0 * noise, noise, -noise))
        _, _, logvar = vae(vae.pixels(frames), noise)
    torch.testing.assert_close(plus + minus, 2 * mean)
    torch.testing.assert_close(plus - mean, (0.5 * logvar).exp() * noise * vae.scale, atol=1e-5, rtol=1e-4)


def test_standardised_vae_survives_saving_as_a_finished_run(
    tmp_path: Path, frames: torch.Tensor, configs: dict
) -> None:
    torch.manual_seed(0)
    vae = VAE.from_config(schema.VAEConfig(config=configs["vae"]), 32)
    batches = [frames, frames.flip(0)[:2]]
    before = vae.fingerprint()
    vae.standardise(batches)
    assert vae.fingerprint() != before
    z0 = torch.cat([vae.encode(b) for b in batches])
    assert z0.mean().item() == pytest.approx(0, abs=1e-4)
    assert z0.var(correction=0).item() == pytest.approx(1, abs=1e-4)

    vae.save_pretrained(tmp_path / "model")
    again = VAE.from_config(schema.VAEConfig(weights=str(tmp_path)), 32)
    assert again.fingerprint() == vae.fingerprint()
    assert torch.equal(again.encode(frames), vae.encode(frames))
    assert AutoencoderKL.from_pretrained(tmp_path / "model").config.shift_factor == vae.shift


def test_every_parameter_of_a_trained_vae_gets_a_gradient(frames: torch.Tensor, configs: dict) -> None:
    vae = VAE.from_config(schema.VAEConfig(config=configs["vae"]), 32)
    x = vae.pixels(frames)
    reconstruction, mean, logvar = vae(x, torch.randn(3, *vae.latent_shape))
    assert reconstruction.shape == x.shape
    ((reconstruction - x).square().mean() + (mean.square() + logvar.exp() - logvar).mean()).backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None] == []


def test_image_size_must_fit(official: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.image_size: 30 is not a multiple of the VAE's factor 4"):
        VAE.from_config(schema.VAEConfig(weights=str(official / "sd3")), 30)
    with pytest.raises(RecipeError, match="latent_channel: unknown field; did you mean latent_channels"):
        VAE.from_config(schema.VAEConfig(config={"latent_channel": 4}), 32)
