"""The frozen StaMo tokenizer in a policy: eyes in place of the towers, and targets of the world head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stamo_dist.models.openvla.network import Features
from stamo_dist.models.tokenizer import Tokenizer

Reads = Literal["patches", "states", "both"]
Target = Literal["state", "motion", "dinov2"]


class StamoVision:
    """States, motions and patch features of frames. It is no part of the trained network."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer.requires_grad_(False).eval()

    @property
    def patch_dim(self) -> int:
        return self.tokenizer.encoder.dim

    @property
    def state_shape(self) -> tuple[int, int]:
        """(tokens, dim) of a state."""
        compressor = self.tokenizer.trained.compressor
        return compressor.tokens, compressor.dim

    def target_shape(self, target: Target) -> tuple[int, int]:
        """(tokens, dim) of what the world head predicts."""
        if target != "dinov2":
            return self.state_shape
        encoder = self.tokenizer.encoder
        return (encoder.image_size // encoder.model.config.patch_size) ** 2, encoder.dim

    @torch.no_grad()
    def read(self, frames: Tensor, reads: Reads) -> Features:
        """uint8 (B, V, H, W, 3) → what the policy reads of V views, view by view."""
        views = frames.shape[1]
        patches, states = self._both(frames.flatten(0, 1))
        return Features(
            patches.unflatten(0, (-1, views)).flatten(1, 2) if reads != "states" else None,
            states.unflatten(0, (-1, views)).flatten(1, 2) if reads != "patches" else None,
        )

    @torch.no_grad()
    def target(self, now: Tensor, then: Tensor, target: Target) -> Tensor:
        """Frames before and after a chunk, uint8 (B, H, W, 3) each → (B, tokens, dim) float32."""
        patches, states = self._both(then)
        if target == "dinov2":
            return patches.float()
        return states.float() if target == "state" else states.float() - self._both(now)[1].float()

    def _both(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.tokenizer.encoder(frames.to(self.tokenizer.device))
        return patches, self.tokenizer.trained.compressor(patches)
