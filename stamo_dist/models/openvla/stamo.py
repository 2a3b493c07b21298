"""The frozen StaMo tokenizer in a policy: its state encoder in place of the towers, and targets of the world head."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stamo_dist.models.compressor import Compressor
from stamo_dist.models.flops import count
from stamo_dist.models.openvla.network import Features
from stamo_dist.models.state_encoder import StateEncoder

Reads = Literal["patches", "states", "both"]
Target = Literal["state", "motion", "dinov2"]


class StamoVision:
    """States, motions and patch features of frames. It is not part of the trained network."""

    def __init__(self, tokenizer: StateEncoder):
        self.tokenizer = tokenizer

    @property
    def patch_dim(self) -> int:
        return self.tokenizer.encoder.dim

    @property
    def state_shape(self) -> tuple[int, int]:
        """(tokens, dim) of a state."""
        compressor = self.tokenizer.compressor
        return compressor.tokens, compressor.dim

    def target_shape(self, target: Target) -> tuple[int, int]:
        """(tokens, dim) of the world head's target."""
        if target != "dinov2":
            return self.state_shape
        encoder = self.tokenizer.encoder
        return (encoder.image_size // encoder.model.config.patch_size) ** 2, encoder.dim

    def flops(self, frames: int) -> int:
        """FLOPs of encoding this many frames."""
        encoder, compressor = self.tokenizer.encoder, self.tokenizer.compressor.cfg
        with torch.device("meta"):
            patches = torch.empty(1, self.target_shape("dinov2")[0], encoder.dim)
            frame = torch.empty(1, 3, encoder.image_size, encoder.image_size)
            return frames * (count(encoder.untrained(), frame) + count(Compressor(compressor, encoder.dim), patches))

    @torch.no_grad()
    def encode(self, frames: Tensor) -> EncodedFrames:
        """uint8 (B, H, W, 3) → patch features and states of the frozen encoder and compressor."""
        patches = self.tokenizer.encoder(frames.to(self.tokenizer.device))
        return EncodedFrames(patches, self.tokenizer.compressor(patches))

    def read(self, frames: Tensor, reads: Reads) -> Features:
        """uint8 (B, V, H, W, 3) → the policy's input from V views, view by view."""
        return self.encode(frames.flatten(0, 1)).features(reads, frames.shape[1])

    def target(self, now: Tensor, then: Tensor, target: Target) -> Tensor:
        """Frames before and after a chunk, uint8 (B, H, W, 3) each → (B, tokens, dim) float32."""
        return self.encode(then).target(self.encode(now) if target == "motion" else None, target)


class EncodedFrames(NamedTuple):
    """Frames encoded once by the frozen tokenizer, for all features read from them."""

    patches: Tensor | None  # (B, N, D), if computed
    states: Tensor  # (B, tokens, dim)

    def first_view(self, views: int) -> EncodedFrames:
        """The first view of each timestep."""
        return EncodedFrames(None if self.patches is None else self.patches[::views], self.states[::views])

    def features(self, reads: Reads, views: int = 1) -> Features:
        """The policy's input, for (B / views) timesteps."""
        patches = None
        if reads != "states":
            assert self.patches is not None, "what is read was computed"
            patches = self.patches.unflatten(0, (-1, views)).flatten(1, 2)
        return Features(
            patches,
            self.states.unflatten(0, (-1, views)).flatten(1, 2) if reads != "patches" else None,
        )

    def target(self, before: EncodedFrames | None, target: Target) -> Tensor:
        """The world head's target from frames after a chunk, (B, tokens, dim) float32.

        `before`: the frames before it, used only for a motion.
        """
        if target == "dinov2":
            assert self.patches is not None, "what is predicted was computed"
            return self.patches.float()
        if target == "state":
            return self.states.float()
        assert before is not None, "a motion has a beginning"
        return self.states.float() - before.states.float()
