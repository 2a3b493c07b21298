"""Pixels ↔ latents: diffusers' AutoencoderKL."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from stamo_dist.errors import RecipeError
from stamo_dist.models import weights
from stamo_dist.models.flops import count
from stamo_dist.models.images import to_float
from stamo_dist.models.weights import LoadReport
from stamo_dist.recipe import schema

FIELD = "model.vae"


def config_problems(cfg: schema.VAEConfig) -> list[str]:
    """Unknown fields of `cfg.config`."""
    return weights.unknown_keys(cfg.config, inspect.signature(AutoencoderKL.__init__).parameters, f"{FIELD}.config")


class VAE(nn.Module):
    """AutoencoderKL with latents normalised as z₀ = (z − shift)·scale; convolutions run channels-last.

    `latent`: whether `encode` returns the posterior's mean or a sample.
    """

    def __init__(self, model: Any, image_size: int, latent: str = "mean"):
        super().__init__()
        factor = 2 ** (len(model.config.block_out_channels) - 1)
        if image_size % factor:
            raise RecipeError([f"data.image_size: {image_size} is not a multiple of the VAE's factor {factor}"])
        self.model: Any = model.to(memory_format=torch.channels_last)  # AutoencoderKL
        self.image_size = image_size
        self.factor = factor  # ratio of image side to latent side
        self.latent = latent
        self.report: LoadReport | None = None

    @classmethod
    def from_config(cls, cfg: schema.VAEConfig, image_size: int) -> VAE:
        """Load `cfg.weights`, or build `cfg.config` with random weights (to be trained by the vae stage).

        Raises:
            RecipeError: fields in `cfg.config` that are unknown or not the checkpoint's, or an image size that is not a
                multiple of the VAE's factor.
            CheckpointError: the checkpoint is missing, incomplete or of another model.
        """
        if cfg.weights is not None:
            found = weights.find(cfg.weights, "vae", f"{FIELD}.weights", cfg.config)
            return cls.from_checkpoint(found, image_size, cfg.latent)
        if problems := config_problems(cfg):
            raise RecipeError(problems)
        return cls(AutoencoderKL.from_config(cfg.config), image_size, cfg.latent)

    @classmethod
    def from_folder(cls, folder: Path, image_size: int, latent: str = "mean") -> VAE:
        """Load a folder in diffusers' layout."""
        return cls.from_checkpoint(weights.opened(folder, "vae", f"{FIELD}.weights"), image_size, latent)

    @classmethod
    def from_checkpoint(cls, found: weights.PretrainedCheckpoint, image_size: int, latent: str = "mean") -> VAE:
        """Load an opened checkpoint."""
        model, report = weights.load(lambda: AutoencoderKL.from_config(found.config), found)
        vae = cls(model, image_size, latent)
        vae.report = report
        return vae

    @property
    def scale(self) -> float:
        return self.model.config.scaling_factor

    @property
    def shift(self) -> float:
        return self.model.config.shift_factor or 0.0

    @property
    def dtype(self) -> torch.dtype:
        return self.model.encoder.conv_in.weight.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image of `image_size`."""
        side = self.image_size // self.factor
        return self.model.config.latent_channels, side, side

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3), or float (B, 3, H, W) in [0, 1] → float32 (B, 3, H, W) in [−1, 1]."""
        return to_float(images) * 2 - 1

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs for training, in float32: reconstruction, mean and log-variance of the posterior.

        `pixels` and the reconstruction are (B, 3, H, W) in [−1, 1]; `noise` (B, C, h, w), standard normal, draws from
        the posterior; mean and log-variance are (B, C, h, w), not normalised.
        """
        mean, logvar = self._posterior(pixels)
        return self._decode(mean + (0.5 * logvar).exp() * noise), mean, logvar

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images → z₀ (B, C, h, w) float32.

        `noise` (B, C, h, w), standard normal, makes a sampled posterior reproducible; unused for the mean.
        """
        mean, logvar = self._posterior(self.pixels(images))
        if self.latent == "sample":
            mean = mean + (0.5 * logvar).exp() * (torch.randn_like(mean) if noise is None else noise)
        return (mean - self.shift) * self.scale

    def decode(self, z0: Tensor) -> Tensor:
        """z₀ (B, C, h, w) → float32 images (B, 3, H, W) in [0, 1]."""
        return ((self._decode(z0 / self.scale + self.shift) + 1) / 2).clamp(0, 1)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixels.to(self.dtype, memory_format=torch.channels_last)
        posterior = self.model.encode(pixels).latent_dist
        return posterior.mean.to(torch.float32), posterior.logvar.to(torch.float32)

    def _decode(self, z: Tensor) -> Tensor:
        return self.model.decode(z.to(self.dtype, memory_format=torch.channels_last)).sample.to(torch.float32)

    @torch.no_grad()
    def standardise(self, batches: Iterable[Tensor]) -> None:
        """Set shift and scale so that the posterior means of these image batches have mean 0 and variance 1.

        Raises:
            ValueError: no images, or latents without variance.
        """
        count, total, squares = 0, 0.0, 0.0
        for images in batches:
            mean = self._posterior(self.pixels(images))[0].to(torch.float64)
            count, total, squares = (
                count + mean.numel(),
                total + mean.sum().item(),
                squares + mean.square().sum().item(),
            )
        variance = squares / count - (total / count) ** 2 if count else 0.0
        if not variance > 0:
            raise ValueError(f"{count} latent values with variance {variance}: nothing to standardise by")
        self.model.register_to_config(shift_factor=total / count, scaling_factor=1 / math.sqrt(variance))

    def flops_per_sample(self) -> int:
        """FLOPs of one frame's forward pass (encoder and decoder), from the configuration alone."""
        with torch.device("meta"):
            vae = VAE(AutoencoderKL.from_config(self.model.config), self.image_size)
            return count(vae, torch.empty(1, 3, self.image_size, self.image_size), torch.empty(1, *self.latent_shape))

    def fingerprint(self) -> str:
        """SHA-256 of the weights and of all settings that affect the latents."""
        normalisation = {"class": "AutoencoderKL", "scale": self.scale, "shift": self.shift}
        return weights.fingerprint(normalisation, self.model.state_dict())

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write diffusers' layout, cast to `dtype`: the folder can be named by `model.vae.weights`."""
        self.model.save_config(folder)
        weights.save(self.model.state_dict(), Path(folder) / "diffusion_pytorch_model.safetensors", dtype)
