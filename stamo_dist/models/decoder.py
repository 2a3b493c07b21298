"""The decoder: Stable Diffusion 3's transformer, conditioned on state tokens instead of text.

The state enters at the two places where SD3 takes its text: as the context sequence (`context_embedder`), and
flattened as the pooled projection that modulates every block. With 2 tokens × 1024 the pooled projection has exactly
SD3's 2048 inputs; the context embedder (4096 inputs in SD3) is new.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from stamo_dist.errors import RecipeError
from stamo_dist.models import weights
from stamo_dist.models.flow import TIMESTEPS
from stamo_dist.models.joint_attention import JointAttention
from stamo_dist.models.recompute import recompute_diffusers
from stamo_dist.models.shards import StoredTensor, write
from stamo_dist.models.weights import LoadReport
from stamo_dist.recipe import schema

FIELD = "model.decoder"
_CONDITIONING = ("context_embedder", "time_text_embed.text_embedder.linear_1")
_DERIVED = {"joint_attention_dim": "model.compressor.dim", "pooled_projection_dim": "model.compressor tokens × dim"}


def config_problems(cfg: schema.DecoderConfig) -> list[str]:
    """Unknown fields of `cfg.config`, and fields that follow from the compressor."""
    known = inspect.signature(SD3Transformer2DModel.__init__).parameters
    problems = weights.unknown_keys(cfg.config, known, f"{FIELD}.config")
    return problems + [
        f"{FIELD}.config.{k}: is derived from {v}; remove it" for k, v in _DERIVED.items() if k in cfg.config
    ]


class Decoder(nn.Module):
    """Velocity of the latents at noise level σ, given the state."""

    def __init__(self, transformer: SD3Transformer2DModel, precondition: bool = False):
        super().__init__()
        self.transformer = transformer
        transformer.set_attn_processor(JointAttention())  # type: ignore[arg-type]  # one of diffusers' own
        self.precondition = precondition
        self.report: LoadReport | None = None
        self._deferred: dict[str, StoredTensor] = {}

    @classmethod
    def from_config(
        cls,
        cfg: schema.DecoderConfig,
        compressor: schema.CompressorConfig,
        latent_shape: tuple[int, int, int],
        *,
        meta_init: bool = False,
    ) -> Decoder:
        """Load `cfg.weights` (SD3 or SD3.5), or build `cfg.config` with random weights.

        With `meta_init` the parameters are on the meta device until `load_weights` reads them from the checkpoint.

        Without weights the number of channels, the size of the position table and the context width default to what
        the latents (C, h, w) and the heads need.

        Raises:
            RecipeError: fields in `cfg.config` that are unknown, derived or not the checkpoint's, or a transformer that
                does not take these latents.
            CheckpointError: the checkpoint is missing or incomplete, or differs beyond the conditioning layers.
        """
        conditioning = {
            "joint_attention_dim": compressor.dim,
            "pooled_projection_dim": compressor.tokens * compressor.dim,
        }
        if cfg.weights is not None:
            found = weights.find(cfg.weights, "decoder", f"{FIELD}.weights", cfg.config)
            return cls.from_checkpoint(found, latent_shape, conditioning, meta_init=meta_init)
        if problems := config_problems(cfg):
            raise RecipeError(problems)
        channels, side, _ = latent_shape
        defaults = {"in_channels": channels, "out_channels": channels, "sample_size": side}
        config = _full({**defaults, **cfg.config, **conditioning})
        config.setdefault("pos_embed_max_size", side // config["patch_size"])
        config.setdefault("caption_projection_dim", config["num_attention_heads"] * config["attention_head_dim"])
        _check(config, latent_shape)
        decoder = cls(SD3Transformer2DModel.from_config(config), cfg.precondition)
        _initialise(decoder.transformer)
        return decoder

    @classmethod
    def from_folder(cls, folder: Path, latent_shape: tuple[int, int, int]) -> Decoder:
        """Load a folder in diffusers' layout, including the conditioning layers."""
        return cls.from_checkpoint(weights.opened(folder, "decoder", f"{FIELD}.weights"), latent_shape)

    @classmethod
    def from_checkpoint(
        cls,
        found: weights.PretrainedCheckpoint,
        latent_shape: tuple[int, int, int],
        conditioning: Mapping[str, int] | None = None,
        *,
        meta_init: bool = False,
    ) -> Decoder:
        """Load an opened checkpoint; `conditioning` replaces config fields of the conditioning layers."""
        config = {**found.config, **(conditioning or {})}
        _check(config, latent_shape)
        stored: dict[str, StoredTensor] = {}
        transformer, report = weights.load(
            lambda: SD3Transformer2DModel.from_config(config),
            found,
            reinitialise=_CONDITIONING if conditioning else (),
            deferred=stored if meta_init else None,
        )
        decoder = cls(transformer)
        decoder.report = report
        decoder._deferred = stored
        return decoder

    def load_weights(self) -> None:
        """Read the deferred weights, each process its own shards; the parameters must have memory."""
        parameters = dict(self.transformer.named_parameters())
        for name, stored in self._deferred.items():
            write(parameters[name], stored.read)

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.pos_embed.proj.weight.dtype

    def forward(self, z: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Latents z_σ (B, C, h, w), σ (B,) float32 and tokens (B, T, dim) → velocity (B, C, h, w) float32.

        With `precondition` the transformer predicts the residual of a linear estimate from z_σ (preconditioning of
        Karras et al. 2022, arXiv 2206.00364, for flow matching), so that it need not learn to pass the noise through.

        Raises:
            TypeError: σ is not float32.
        """
        if sigma.dtype != torch.float32:
            # bf16 has 9 values between 0.97 and 1: an engine that casts inputs would silently round the noise level.
            raise TypeError(f"sigma is {sigma.dtype}, expected float32: the engine must not cast the module's inputs")
        tokens = tokens.to(self.dtype)
        level = sigma.view(-1, 1, 1, 1)
        variance = (1 - level).square() + level.square()  # of z_σ, when z₀ has variance 1
        velocity = self.transformer(
            hidden_states=(z / variance.sqrt() if self.precondition else z).to(self.dtype),
            encoder_hidden_states=tokens,
            pooled_projections=tokens.flatten(1),
            timestep=sigma * TIMESTEPS,
            return_dict=False,
        )[0].to(torch.float32)
        if self.precondition:
            # The best linear estimate of ε − z₀ from z_σ is (2σ−1)/variance · z_σ; its error has variance 1/variance.
            velocity = (2 * level - 1) / variance * z + velocity / variance.sqrt()
        return velocity

    def set_gradient_checkpointing(self, every: int) -> None:
        recompute_diffusers(self.transformer, self.transformer.transformer_blocks, every)

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None, shard_size: str = "5GB") -> None:
        """Write diffusers' layout."""
        self.transformer.save_config(folder)
        weights.save_shards(
            self.transformer.state_dict(), folder, stem="diffusion_pytorch_model", dtype=dtype, shard_size=shard_size
        )


def _full(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the class's defaults, except for fields that this module derives."""
    derived = ("self", "pos_embed_max_size", "caption_projection_dim")
    parameters = inspect.signature(SD3Transformer2DModel.__init__).parameters
    return {**{k: p.default for k, p in parameters.items() if k not in derived}, **config}


def _check(config: Mapping[str, Any], latent_shape: tuple[int, int, int]) -> None:
    channels, side, _ = latent_shape
    config = _full(dict(config))
    patch, table = config["patch_size"], config.get("pos_embed_max_size")
    out = config["out_channels"] if config["out_channels"] is not None else config["in_channels"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    problems = []
    if (config["in_channels"], out) != (channels, channels):
        problems.append(f"in_channels and out_channels are {config['in_channels']} and {out}, the VAE has {channels}")
    if side % patch:
        problems.append(f"patch_size {patch} does not divide the latents' side {side}")
    if table is not None and side // patch > table:
        problems.append(f"pos_embed_max_size {table} is less than the {side // patch} patches of a side")
    if config.get("caption_projection_dim", width) != width:
        problems.append(f"caption_projection_dim is {config['caption_projection_dim']}, the heads make {width}")
    if problems:
        raise RecipeError([f"{FIELD}: {p}" for p in problems])


def _initialise(model: Any) -> None:
    """adaLN-Zero (Peebles & Xie 2022, arXiv 2212.09748): every block starts as the identity, the velocity at zero.

    The other layers keep PyTorch's initialisation.
    """
    modulations = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*modulations, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
