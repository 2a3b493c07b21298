"""The feature extractor: DINOv2 (Oquab et al. 2023, arXiv 2304.07193), transformers' Dinov2Model.

Also with registers (Darcet et al. 2023, arXiv 2309.16588), its Dinov2WithRegistersModel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from stamo_dist.errors import RecipeError
from stamo_dist.models import dinov2_names, weights
from stamo_dist.models.images import imagenet_normalise, resize, to_float
from stamo_dist.models.recompute import recompute_transformers
from stamo_dist.models.weights import LoadReport
from stamo_dist.recipe import schema

FIELD = "model.encoder"
_REGISTERS = "num_register_tokens"  # this field in a config means that there are registers
Dinov2 = Dinov2Model | Dinov2WithRegistersModel


def config_problems(cfg: schema.EncoderConfig) -> list[str]:
    """What is wrong with `cfg.config` and `cfg.image_size`, before any weight is read."""
    config = Dinov2WithRegistersConfig() if _REGISTERS in cfg.config else Dinov2Config()
    problems = weights.unknown_keys(cfg.config, [*config.to_dict(), _REGISTERS], f"{FIELD}.config")
    patch = cfg.config.get("patch_size", config.patch_size)
    if cfg.weights is None and cfg.image_size % patch:
        problems.append(f"{FIELD}.image_size: {cfg.image_size} is not a multiple of the patch size {patch}")
    return problems


class Encoder(nn.Module):
    """Images → patch tokens (B, N, D): the last hidden states after the final LayerNorm, without class and registers.

    With `output` "cls" the class token alone, (B, 1, D).

    The whole frame is resized to a square of `image_size` (DINOv2's own evaluation crops the centre; in a robot's
    frame every part may matter). The position embeddings are resampled to that size once, by transformers' own
    function, so a forward pass does not interpolate and a trained encoder trains the resampled ones.
    """

    def __init__(self, model: Dinov2, image_size: int, output: str = "patches"):
        super().__init__()
        patch = model.config.patch_size
        if image_size % patch:
            raise RecipeError([f"{FIELD}.image_size: {image_size} is not a multiple of the patch size {patch}"])
        self.model = model
        self.image_size, self.output = image_size, output
        self.registers = int(getattr(model.config, _REGISTERS, 0))
        self.report: LoadReport | None = None
        _resample_positions(model, image_size)
        if hasattr(model.embeddings, "mask_token"):
            model.embeddings.mask_token.requires_grad_(False)  # used only in DINOv2's own pretraining

    @classmethod
    def from_config(cls, cfg: schema.EncoderConfig) -> Encoder:
        """Load `cfg.weights`, or build `cfg.config` with random weights.

        Raises:
            RecipeError: fields in `cfg.config` that are unknown or not the checkpoint's, or an image size that the
                patches do not divide.
            CheckpointError: the checkpoint is missing, incomplete or of another model.
        """
        if cfg.weights is not None:
            found = weights.find(cfg.weights, "encoder", f"{FIELD}.weights", cfg.config)
            return cls.from_checkpoint(found, cfg.image_size, cfg.output)
        if problems := config_problems(cfg):
            raise RecipeError(problems)
        return cls(_build({"image_size": cfg.image_size, **cfg.config}), cfg.image_size, cfg.output)

    @classmethod
    def from_folder(cls, folder: Path, image_size: int, output: str = "patches") -> Encoder:
        """Load a folder in the layout of transformers, or of timm."""
        return cls.from_checkpoint(weights.opened(folder, "encoder", f"{FIELD}.weights"), image_size, output)

    @classmethod
    def from_checkpoint(cls, found: weights.PretrainedCheckpoint, image_size: int, output: str = "patches") -> Encoder:
        """Load an opened checkpoint."""
        stored = dinov2_names.of_the_class(found.stored)
        model, report = weights.load(lambda: _build(found.config), replace(found, stored=stored))
        encoder = cls(model, image_size, output)
        encoder.report = report
        return encoder

    def untrained(self) -> Encoder:
        """A randomly initialised encoder of this shape, for counting parameters or as a baseline."""
        return Encoder(_build(self.model.config.to_dict()), self.image_size, self.output)

    @property
    def dim(self) -> int:
        """Dimension D of a patch token."""
        return self.model.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embeddings.patch_embeddings.projection.weight.dtype

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) or float (B, 3, H, W) in [0, 1] → patch tokens (B, N, D), row by row; or (B, 1, D)."""
        pixels = imagenet_normalise(resize(to_float(images), self.image_size))
        tokens: Tensor = self.model(pixel_values=pixels.to(self.dtype)).last_hidden_state
        return tokens[:, :1] if self.output == "cls" else tokens[:, 1 + self.registers :]

    def set_gradient_checkpointing(self, every: int) -> None:
        recompute_transformers(self.model, self.model.encoder.layer, every)

    def fingerprint(self, seen: Callable[[Tensor], Tensor] = Tensor.detach) -> str:
        """SHA-256 of the weights (each mapped by `seen`) and of all settings that affect the features."""
        decides: dict[str, object] = {"class": type(self.model).__name__, "image_size": self.image_size}
        if self.output != "patches":  # left out by the first fingerprints
            decides["output"] = self.output
        return weights.fingerprint(decides, dinov2_names.released(self.model.state_dict()), seen)

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write transformers' layout, by the released names."""
        self.model.config.save_pretrained(folder)
        weights.save(dinov2_names.released(self.model.state_dict()), folder / "model.safetensors", dtype)


def _build(config: Mapping[str, Any]) -> Dinov2:
    if _REGISTERS in config:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig.from_dict(dict(config)))
    return Dinov2Model(Dinov2Config.from_dict(dict(config)))


@torch.no_grad()
def _resample_positions(model: Dinov2, image_size: int) -> None:
    embeddings = model.embeddings
    patches = (image_size // model.config.patch_size) ** 2
    table = embeddings.position_embeddings
    like = table.new_empty(1, patches + 1, table.shape[-1])  # only its shape is used
    embeddings.position_embeddings = nn.Parameter(embeddings.interpolate_pos_encoding(like, image_size, image_size))
    embeddings.patch_embeddings.image_size = (image_size, image_size)
    embeddings.patch_embeddings.num_patches = patches
    model.config.image_size = image_size
