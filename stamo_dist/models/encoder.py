"""The feature extractor: DINOv2 (Oquab et al. 2023, arXiv 2304.07193), transformers' Dinov2Model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from stamo_dist.errors import RecipeError
from stamo_dist.models import weights
from stamo_dist.models.images import imagenet_normalise, resize, to_float
from stamo_dist.models.weights import LoadReport
from stamo_dist.recipe import schema

FIELD = "model.encoder"
_KIND = ("model_type", "dinov2")


def config_problems(cfg: schema.Encoder) -> list[str]:
    """What is wrong with `cfg.config` and `cfg.image_size`, before any weight is read."""
    problems = weights.unknown_keys(cfg.config, Dinov2Config().to_dict(), f"{FIELD}.config")
    patch = cfg.config.get("patch_size", Dinov2Config().patch_size)
    if cfg.weights is None and cfg.image_size % patch:
        problems.append(f"{FIELD}.image_size: {cfg.image_size} is not a multiple of the patch size {patch}")
    return problems


class Encoder(nn.Module):
    """Images → patch tokens (B, N, D): the last hidden states after the final LayerNorm, without the class token.

    With `output` "cls" the class token alone, (B, 1, D).

    The whole frame is resized to a square of `image_size` (DINOv2's own evaluation crops the centre; a robot's frame
    has no part to spare). The position embeddings are resampled to that size once, by transformers' own function, so
    a forward pass does not interpolate and a trained encoder trains the resampled ones.
    """

    def __init__(self, model: Dinov2Model, image_size: int, output: str = "patches"):
        super().__init__()
        patch = model.config.patch_size
        if image_size % patch:
            raise RecipeError([f"{FIELD}.image_size: {image_size} is not a multiple of the patch size {patch}"])
        self.model = model
        self.image_size, self.output = image_size, output
        self.report: LoadReport | None = None
        _resample_positions(model, image_size)
        if hasattr(model.embeddings, "mask_token"):
            model.embeddings.mask_token.requires_grad_(False)  # DINOv2's own pretraining uses it, nothing here does

    @classmethod
    def from_config(cls, cfg: schema.Encoder) -> Encoder:
        """Load `cfg.weights`, or build `cfg.config` with random weights.

        Raises:
            RecipeError: unknown fields in `cfg.config`, or an image size that the patches do not divide.
            CheckpointError: the checkpoint is missing, incomplete or of another model.
        """
        if cfg.weights is not None:
            folder = weights.locate(cfg.weights, ("", "encoder"), f"{FIELD}.weights")
            return cls.from_folder(folder, cfg.image_size, cfg.output)
        if problems := config_problems(cfg):
            raise RecipeError(problems)
        model = Dinov2Model(Dinov2Config(**{"image_size": cfg.image_size, **cfg.config}))
        return cls(model, cfg.image_size, cfg.output)

    @classmethod
    def from_folder(cls, folder: Path, image_size: int, output: str = "patches") -> Encoder:
        """Load a folder in transformers' layout."""
        config = Dinov2Config.from_dict(weights.read_config(folder, f"{FIELD}.weights", _KIND))
        model, report = weights.load(lambda: Dinov2Model(config), folder, f"{FIELD}.weights")
        encoder = cls(model, image_size, output)
        encoder.report = report
        return encoder

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
        return tokens[:, :1] if self.output == "cls" else tokens[:, 1:]

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        if enabled:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def fingerprint(self, seen: Callable[[Tensor], Tensor] = Tensor.detach) -> str:
        """SHA-256 of the weights (`seen` of each) and of what else decides the features."""
        decides: dict[str, object] = {"class": "Dinov2Model", "image_size": self.image_size}
        if self.output != "patches":  # which the first fingerprints do not name
            decides["output"] = self.output
        return weights.fingerprint(decides, self.model.state_dict(), seen)

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write transformers' layout."""
        self.model.config.save_pretrained(folder)
        weights.save(self.model.state_dict(), folder / "model.safetensors", dtype)


@torch.no_grad()
def _resample_positions(model: Dinov2Model, image_size: int) -> None:
    embeddings = model.embeddings
    patches = (image_size // model.config.patch_size) ** 2
    table = embeddings.position_embeddings
    like = table.new_empty(1, patches + 1, table.shape[-1])  # only its shape is read
    embeddings.position_embeddings = nn.Parameter(embeddings.interpolate_pos_encoding(like, image_size, image_size))
    embeddings.patch_embeddings.image_size = (image_size, image_size)
    embeddings.patch_embeddings.num_patches = patches
    model.config.image_size = image_size
