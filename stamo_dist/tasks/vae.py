"""Training a small VAE, for use without a pretrained one (the demo)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stamo_dist.data.loader import Batch, CachedStates
from stamo_dist.models.vae import VAE
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks.base import WHOLE, ExportLayout, LossOutput, load_trained
from stamo_dist.tasks.noise import StepNoise


class VAETask:
    """L = w₁·|x − x̂| + w₂·(x − x̂)² + w_KL·KL(q(z|x) ‖ N(0, 1)), means over pixels and latents; x in [−1, 1]."""

    terms: tuple[str, ...] = ("loss", "l1", "mse", "kl")
    latents: str | None = None
    states: CachedStates | None = None
    init_frames = 0
    notes: tuple[str, ...] = ("the latents will be standardised on training frames when the VAE is exported",)

    def __init__(self, recipe: Recipe):
        self._cfg = recipe.model.vae
        self.vae = VAE.from_config(recipe.model.vae, recipe.data.image_size)
        self.trained: nn.Module = self.vae
        report = self.vae.report
        self.sources: Mapping[str, str] = {} if report is None else {"model.vae.weights": report.source}
        self.block_classes: tuple[str, ...] = ("UNetMidBlock2D", "DownEncoderBlock2D", "UpDecoderBlock2D")

    @property
    def frozen(self) -> Mapping[str, str]:
        return {}

    def initialise(self, frames: Tensor) -> None:
        """Does nothing: no part depends on data."""

    def load_weights(self) -> None:
        """Does nothing: the model was built with its weights."""

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Does nothing: no part is frozen."""

    def loss(self, module: nn.Module, batch: Batch, noise: StepNoise) -> LossOutput:
        x = self.vae.pixels(batch.images)
        epsilon = noise.normal(batch.sample, self.vae.latent_shape)
        reconstruction, mean, logvar = module(x, epsilon)
        error = reconstruction.float() - x
        l1, mse = error.abs().flatten(1).mean(1), error.square().flatten(1).mean(1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().flatten(1).mean(1)
        loss = self._cfg.l1_weight * l1 + self._cfg.mse_weight * mse + self._cfg.kl_weight * kl
        return LossOutput(loss.mean(), {"loss": loss, "l1": l1, "mse": mse, "kl": kl})

    def flops_per_sample(self) -> float:
        return 3 * self.vae.flops_per_sample()

    def export(
        self, folder: Path, weights: dict[str, Tensor], batches: Iterable[Batch], layout: ExportLayout = WHOLE
    ) -> None:
        """Write the AutoencoderKL with the shift and scale that standardise its latents on training data."""
        load_trained(self.trained, weights)
        self.vae.standardise(batch.images for batch in batches)
        self.vae.save_pretrained(folder, layout.dtype)
