"""Training the tokenizer: flow matching of the frame's latents, conditioned on its state tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stamo_dist.data.loader import Batch, CachedStates
from stamo_dist.models import flow
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks.base import WHOLE, ExportLayout, LossOutput, load_trained
from stamo_dist.tasks.noise import StepNoise

_SIGMA, _EPSILON, _POSTERIOR, _STATE = 0, 1, 2, 3  # independent noise streams of one sample


class TokenizerTask:
    """L = ‖v(z_σ, σ, s) − (ε − z₀)‖², averaged over the latent (STAMO §1), s = E(o).

    Not in the paper: noise on s, and the second loss λ·‖W s + b − z₀‖² of `model.compressor.straighten`.
    """

    states: CachedStates | None = None

    def __init__(self, recipe: Recipe, *, meta_init: bool = False, unfilled: bool = False):
        self._flow = recipe.flow
        self.tokenizer = Tokenizer.from_config(
            recipe.model, recipe.flow, recipe.data.image_size, meta_init=meta_init, unfilled=unfilled
        )
        self.trained: nn.Module = self.tokenizer.trained
        self.block_classes = self.tokenizer.block_classes()
        self.notes: tuple[str, ...] = tuple(self.tokenizer.notes)
        self.sources: Mapping[str, str] = self.tokenizer.sources
        self._compressor = recipe.model.compressor
        self.terms: tuple[str, ...] = ("loss", "flow", "straight") if self._compressor.straighten else ("loss",)
        self._joint_encoder = recipe.model.encoder.train
        self._sample_posterior = recipe.model.vae.latent == "sample"
        self.init_frames = recipe.model.compressor.standardise
        self._cached = recipe.data.latents == "cached"
        self.latents: str | None = self.tokenizer.frozen_fingerprints()["vae"] if self._cached else None
        self.tokenizer.trained.set_gradient_checkpointing(recipe.train.recompute)
        if recipe.train.compile:
            self.tokenizer.compile_blocks()

    @property
    def frozen(self) -> Mapping[str, str]:
        return self.tokenizer.frozen_fingerprints()

    def initialise(self, frames: Tensor) -> None:
        self.tokenizer.standardise_states(frames)

    def load_weights(self) -> None:
        self.tokenizer.trained.decoder.load_weights()

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.tokenizer.freeze(device, dtype)

    def loss(self, module: nn.Module, batch: Batch, noise: StepNoise) -> LossOutput:
        with torch.no_grad():
            if batch.latents is not None:
                z0 = batch.latents.float()
            else:
                posterior = None
                if self._sample_posterior:
                    posterior = noise.normal(batch.sample, self.tokenizer.latent_shape, _POSTERIOR)
                z0 = self.tokenizer.latents(batch.images, noise=posterior).float()
            sigma = flow.sigma(noise.uniform(batch.sample, _SIGMA), self._flow)
            epsilon = noise.normal(batch.sample, z0.shape[1:], _EPSILON)
            z = flow.interpolate(z0, epsilon, sigma)
            seen = batch.images if self._joint_encoder else self.tokenizer.features(batch.images)
            blur = None
            if self._compressor.noise:
                shape = (self._compressor.tokens, self._compressor.dim)
                blur = self._compressor.noise * noise.normal(batch.sample, shape, _STATE)
        velocity, straight = module(seen, z, sigma, blur)
        by_flow = (velocity.float() - (epsilon - z0)).square().flatten(1).mean(1)
        if straight is None:
            return LossOutput(by_flow.mean(), {"loss": by_flow})
        by_line = (straight - z0).square().flatten(1).mean(1)
        loss = by_flow + self._compressor.straighten * by_line
        return LossOutput(loss.mean(), {"loss": loss, "flow": by_flow, "straight": by_line})

    def flops_per_sample(self) -> float:
        trained, frozen = self.tokenizer.flops_per_sample(cached_latents=self._cached)
        return 3 * trained + frozen

    def export(
        self, folder: Path, weights: dict[str, Tensor], batches: Iterable[Batch], layout: ExportLayout = WHOLE
    ) -> None:
        load_trained(self.trained, weights)
        self.tokenizer.save_pretrained(folder, dtype=layout.dtype, shard_size=layout.shard_size, alone=layout.alone)
