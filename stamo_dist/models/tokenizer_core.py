"""The trained part of the StaMo tokenizer, wrapped by the engine: compressor, decoder, jointly trained encoder."""

from __future__ import annotations

from typing import NamedTuple

from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersLayer

from stamo_dist.models.compressor import Compressor, CompressorLayer
from stamo_dist.models.decoder import Decoder
from stamo_dist.models.encoder import Encoder

#: Transformer blocks, which are compiled and sharded individually.
BLOCKS = (CompressorLayer, JointTransformerBlock, Dinov2Layer, Dinov2WithRegistersLayer)


class TokenizerPrediction(NamedTuple):
    """The core's outputs, float32 (B, C, h, w) each."""

    velocity: Tensor
    straight: Tensor | None  # the latents z₀, by a linear map of the state alone


class TokenizerCore(nn.Module):
    """The trained part: compressor and decoder, and the encoder when it is trained jointly.

    `straight`, a linear map from the flattened state to the flattened latents, is used only in training.
    """

    def __init__(
        self,
        compressor: Compressor,
        decoder: Decoder,
        encoder: Encoder | None = None,
        straight: nn.Linear | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.compressor = compressor
        self.decoder = decoder
        self.straight = straight

    def forward(
        self, features_or_images: Tensor, z_sigma: Tensor, sigma: Tensor, state_noise: Tensor | None = None
    ) -> TokenizerPrediction:
        """Velocity of z_σ (B, C, h, w) at σ (B,) float32.

        The first argument is the frozen encoder's patch tokens (B, N, D), or, where the encoder is trained jointly, the
        images. `state_noise` (B, tokens, dim) is added to the state.
        """
        state = self.state(features_or_images)
        if state_noise is not None:
            state = state + state_noise.to(state.dtype)
        straight = None
        if self.straight is not None:
            straight = self.straight(state.flatten(1)).float().view(z_sigma.shape)
        return TokenizerPrediction(self.decoder(z_sigma, sigma, state), straight)

    def state(self, features_or_images: Tensor) -> Tensor:
        """(B, tokens, dim) state tokens."""
        return self.compressor(features_or_images if self.encoder is None else self.encoder(features_or_images))

    def set_gradient_checkpointing(self, every: int) -> None:
        """Recompute the activations of one block of each `every` in the backward pass; 0: of none."""
        self.compressor.recompute = every
        self.decoder.set_gradient_checkpointing(every)
        if self.encoder is not None:
            self.encoder.set_gradient_checkpointing(every)

    def block_classes(self) -> tuple[str, ...]:
        """Class names of the transformer blocks in here, which FSDP shards one by one."""
        return tuple(c.__name__ for c in BLOCKS if any(isinstance(m, c) for m in self.modules()))
