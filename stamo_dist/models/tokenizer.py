"""The StaMo tokenizer: a diffusion autoencoder from an image to a few state tokens and back.

    image → encoder (DINOv2) → compressor → state tokens → decoder (SD3 transformer) → latents → VAE → image

`TokenizerCore` is trained and wrapped by the engine; the rest is frozen and outside of it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from stamo_dist.errors import RecipeError
from stamo_dist.models import decoder as decoders
from stamo_dist.models import encoder as encoders
from stamo_dist.models import flow as flows
from stamo_dist.models import vae as vaes
from stamo_dist.models import weights
from stamo_dist.models.compressor import Compressor
from stamo_dist.models.decoder import Decoder
from stamo_dist.models.encoder import Encoder
from stamo_dist.models.exported import FORMAT, check_parts, exported, read_compressor, read_encoder
from stamo_dist.models.flops import Flops, count
from stamo_dist.models.shards import on_meta
from stamo_dist.models.tokenizer_core import BLOCKS, TokenizerCore
from stamo_dist.models.vae import VAE
from stamo_dist.pretrained.pin import pin_model
from stamo_dist.recipe import schema

log = logging.getLogger(__name__)


class Tokenizer(nn.Module):
    """Images ↔ state tokens. `trained` is the core; `vae` and (unless trained) `frozen_encoder` never change.

    Images are uint8 (B, H, W, 3), as frames come from the shards, or float (B, 3, H, W) in [0, 1].
    """

    def __init__(
        self,
        cfg: schema.Model,
        flow: schema.Flow,
        *,
        encoder: Encoder,
        compressor: Compressor,
        decoder: Decoder,
        vae: VAE,
    ):
        super().__init__()
        joint = cfg.encoder.train
        self.cfg, self.flow = cfg, flow
        straight = None
        if cfg.compressor.straighten:
            straight = nn.Linear(cfg.compressor.tokens * cfg.compressor.dim, math.prod(vae.latent_shape))
            nn.init.zeros_(straight.weight)
        self.trained = TokenizerCore(compressor, decoder, encoder if joint else None, straight)
        self.frozen_encoder = None if joint else encoder.requires_grad_(False).eval()
        self.vae = vae.requires_grad_(False).eval()
        self._frozen_fingerprints: dict[str, str] | None = None

    @classmethod
    def from_config(
        cls,
        cfg: schema.Model,
        flow: schema.Flow,
        image_size: int,
        *,
        meta_init: bool = False,
        unfilled: bool = False,
    ) -> Tokenizer:
        """Build from a recipe for square frames of `image_size`; parts without weights are random (torch's generator).

        With `meta_init` the decoder is on the meta device until `trained.decoder.load_weights` reads its weights, each
        process its own shards; with `unfilled` a random one too, which the caller gives memory and values.

        Raises:
            RecipeError: fields that the model classes do not know or that do not fit each other.
            CheckpointError: weights that are missing, incomplete or of another model.
        """
        problems: list[str] = []
        for part, module in ((cfg.encoder, encoders), (cfg.vae, vaes), (cfg.decoder, decoders)):
            if part.weights is None:
                problems += module.config_problems(part)
        if problems:
            raise RecipeError(problems)
        vae = VAE.from_config(cfg.vae, image_size)
        encoder = Encoder.from_config(cfg.encoder)
        compressor = Compressor(cfg.compressor, encoder.dim)
        with on_meta() if unfilled and cfg.decoder.weights is None else nullcontext():
            decoder = Decoder.from_config(cfg.decoder, cfg.compressor, vae.latent_shape, meta_init=meta_init)
        tokenizer = cls(cfg, flow, encoder=encoder, compressor=compressor, decoder=decoder, vae=vae)
        tokenizer.cfg = pin_model(cfg, tokenizer.sources)
        return tokenizer

    @property
    def encoder(self) -> Encoder:
        """The feature extractor, frozen or part of the core."""
        encoder = self.trained.encoder or self.frozen_encoder
        assert encoder is not None, "either the core or the tokenizer holds the encoder"
        return encoder

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one frame's latents."""
        return self.vae.latent_shape

    @property
    def device(self) -> torch.device:
        return self.trained.compressor.queries.device

    @property
    def notes(self) -> list[str]:
        """Notes for the user on the parts: their sources, and every re-initialised layer."""
        return [
            f"{field}: {part.report if part.report is not None else 'random initial weights'}"
            for field, part in self._parts().items()
        ]

    @property
    def sources(self) -> dict[str, str]:
        """Recipe field → location of its weights: a path, or OWNER/NAME@COMMIT of the hub."""
        return {f"{field}.weights": part.report.source for field, part in self._parts().items() if part.report}

    def _parts(self) -> dict[str, Encoder | Decoder | VAE]:
        return {encoders.FIELD: self.encoder, decoders.FIELD: self.trained.decoder, vaes.FIELD: self.vae}

    def train(self, mode: bool = True) -> Tokenizer:
        """As nn.Module.train, but the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.vae.eval()
        if self.frozen_encoder is not None:
            self.frozen_encoder.eval()
        return self

    def freeze(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Move the frozen parts to `device` and cast them to `dtype`."""
        self.frozen_fingerprints()  # before casting: fingerprints of the loaded weights
        self.vae.to(device=device, dtype=dtype)
        if self.frozen_encoder is not None:
            self.frozen_encoder.to(device=device, dtype=dtype)

    def compile_blocks(self) -> None:
        """torch.compile every transformer block and the VAE's encoder; call it before an engine wraps the core.

        Only `forward` is replaced, so names and hooks are unchanged, and equal blocks share one compilation.
        """
        blocks: list[nn.Module] = [m for m in self.modules() if isinstance(m, BLOCKS)]
        for module in (*blocks, self.vae.model.encoder):
            module.forward = torch.compile(module.forward)

    def block_classes(self) -> tuple[str, ...]:
        return self.trained.block_classes()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The core's input: the frozen encoder's patch tokens (B, N, D), or the images if the encoder is trained."""
        return images if self.frozen_encoder is None else self.frozen_encoder(images)

    @torch.no_grad()
    def standardise_states(self, images: Tensor) -> None:
        """Standardise the states of these frames, per dimension, before any training."""
        features = torch.cat([self.features(part) for part in images.split(32)])
        encoder = self.trained.encoder
        if encoder is not None:
            features = torch.cat([encoder(part) for part in features.split(32)])
        self.trained.compressor.standardise(features)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images → state tokens (B, tokens, dim) float32; each of mean 0 and norm √dim, except with `norm: false`."""
        return self.trained.state(self.features(images.to(self.device))).to(torch.float32)

    @torch.no_grad()
    def latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images → normalised z₀ (B, C, h, w) float32; `noise` (B, C, h, w) draws a sampled posterior."""
        return self.vae.encode(images, noise)

    @torch.no_grad()
    def decode(self, tokens: Tensor, steps: int | None = None, noise: Tensor | None = None) -> Tensor:
        """State tokens (B, tokens, dim) → float32 images (B, 3, H, W) in [0, 1] by the Euler sampler.

        `noise` (B, C, h, w), standard normal, is the sampler's start: equal noise gives equal images. It is
        drawn from torch's generator when omitted. `steps` defaults to `flow.sampler_steps`.
        """
        tokens = tokens.to(self.device)
        if noise is None:
            noise = torch.randn(len(tokens), *self.latent_shape, device=self.device)
        z0 = flows.sample(
            lambda z, sigma: self.trained.decoder(z, sigma, tokens),
            noise.to(self.device),
            steps or self.flow.sampler_steps,
            self.flow.shift,
        )
        return self.vae.decode(z0)

    def flops(self) -> Flops:
        """Arithmetic of one frame's forward pass, from the configurations alone, so it works with a wrapped core."""
        size, encoder = self.vae.image_size, self.encoder
        with torch.device("meta"):
            transformer = SD3Transformer2DModel.from_config(self.trained.decoder.transformer.config)
            vae = VAE(AutoencoderKL.from_config(self.vae.model.config), size)
            patches = (encoder.image_size // encoder.model.config.patch_size) ** 2
            features = torch.empty(1, 1 if encoder.output == "cls" else patches, encoder.dim)
            tokens = torch.empty(1, self.cfg.compressor.tokens, self.cfg.compressor.dim)
            frame = torch.empty(1, 3, size, size)
            return Flops(
                encoder=count(encoder.untrained(), frame),
                compressor=count(Compressor(self.cfg.compressor, encoder.dim), features),
                decoder=count(Decoder(transformer), torch.empty(1, *self.latent_shape), torch.empty(1), tokens),
                vae_encoder=count(vae.model.encoder, frame),
                joint_encoder=self.frozen_encoder is None,
            )

    def flops_per_sample(self, cached_latents: bool = False) -> tuple[int, int]:
        """FLOPs of one frame's forward pass through the trained and through the frozen parts."""
        flops = self.flops()
        return flops.trained(), flops.frozen(cached_latents)

    def frozen_fingerprints(self) -> dict[str, str]:
        """SHA-256 of each frozen part, by its name, as it was loaded (before `freeze` cast it)."""
        if self._frozen_fingerprints is None:
            parts = {"encoder": self.frozen_encoder, "vae": self.vae}
            self._frozen_fingerprints = {name: part.fingerprint() for name, part in parts.items() if part is not None}
        return self._frozen_fingerprints

    def fingerprint(self, seen: Callable[[Tensor], Tensor] = Tensor.detach) -> str:
        """SHA-256 of the tokenizer: configuration, frozen parts, the core's current weights (each mapped by `seen`)."""
        config = {"flow": self.flow.model_dump(), "frozen": self.frozen_fingerprints(), **self._settings()}
        lasting = {k: v for k, v in self.trained.state_dict().items() if not k.startswith("straight.")}
        return weights.fingerprint(config, lasting, seen)

    def _settings(self) -> dict[str, Any]:
        more = {} if self.encoder.output == "patches" else {"encoder_output": self.encoder.output}
        return {
            **more,
            "image_size": self.vae.image_size,
            "encoder_image_size": self.encoder.image_size,
            "compressor": self.trained.compressor.settings(),
            "latent": self.vae.latent,
        }

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, shard_size: str = "5GB", alone: bool = False
    ) -> None:
        """Write a folder that `from_pretrained` reads, the trained parts cast to `dtype`.

        `transformer/` and `vae/` open with diffusers, `encoder/` with transformers; a frozen encoder is written only
        with `alone`, else named by its source and fingerprint. `stamo.json` is written last; it has the fingerprints of
        all parts, so that a reader of the encoder half need not read the rest.

        Raises:
            ValueError: `freeze` has cast the frozen parts, so the written weights would differ from the loaded ones.
        """
        if self.vae.dtype != torch.float32:
            raise ValueError(f"the frozen parts were cast to {self.vae.dtype}; save a tokenizer that was not")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stamo.json").unlink(missing_ok=True)
        weights.save(self.trained.compressor.state_dict(), folder / "compressor" / "model.safetensors", dtype)
        self.trained.decoder.save_pretrained(folder / "transformer", dtype, shard_size)
        self.vae.save_pretrained(folder / "vae")
        if self.trained.encoder is not None:
            self.trained.encoder.save_pretrained(folder / "encoder", dtype)
        elif alone:
            self.encoder.save_pretrained(folder / "encoder")
        about = {
            "format": FORMAT,
            "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
            "image_size": self.vae.image_size,
            "model": self.cfg.model_dump(mode="json"),
            "flow": self.flow.model_dump(mode="json"),
            "frozen": self.frozen_fingerprints(),
            "fingerprint": self.fingerprint(written := weights.written(dtype)),
            "sees": {
                "encoder": self.frozen_fingerprints().get("encoder") or self.encoder.fingerprint(written),
                "compressor": self.trained.compressor.fingerprint(written),
            },
        }
        (folder / "stamo.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, encoder_weights: str | None = None) -> Tokenizer:
        """Read what `save_pretrained` wrote, or the run folder whose `model/` holds it.

        `encoder_weights`: location of the frozen encoder on this machine; the recorded one when omitted.

        Raises:
            CheckpointError: files are missing or corrupt, or the frozen encoder is not the one it was trained with.
        """
        root, about = exported(folder)
        cfg, flow = schema.Model.model_validate(about["model"]), schema.Flow.model_validate(about["flow"])
        vae = VAE.from_folder(root / "vae", about["image_size"], cfg.vae.latent)
        encoder = read_encoder(root, cfg, encoder_weights)
        compressor = read_compressor(root, cfg, encoder.dim)
        decoder = Decoder.from_folder(root / "transformer", vae.latent_shape)
        decoder.precondition = cfg.decoder.precondition
        tokenizer = cls(cfg, flow, encoder=encoder, compressor=compressor, decoder=decoder, vae=vae)
        check_parts(tokenizer.frozen_fingerprints(), about["frozen"], root)
        return tokenizer.eval()
