"""The frozen models whose outputs are cached, and the arithmetic they run in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stamo_dist.data.frame_cache import Kind, Precision
from stamo_dist.device import Device
from stamo_dist.errors import RecipeError, RunError
from stamo_dist.models.exported import exported
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.models.vae import VAE
from stamo_dist.recipe.schema import Recipe

Arithmetic = Literal["fp32", "tf32", "bf16"]
ARITHMETIC: tuple[Arithmetic, ...] = ("fp32", "tf32", "bf16")
COMPARED = 8  # frames that are also computed in fp32


class FrameEncoder(ABC):
    """A frozen model in fp32, and the rows that it makes of frames.

    Attributes:
        kind, stored: Of the cache, and the number format of its bytes.
        fingerprint: Of the model and the processing of its output.
        about: For the manifests.
    """

    kind: Kind
    stored: Precision

    def __init__(self, model: nn.Module, fingerprint: str, source: str, device: Device):
        self.model: Any = model.requires_grad_(False).eval().to(device.torch_device)
        self.fingerprint, self.about = fingerprint, {"model": source}

    @abstractmethod
    def rows(self, images: Tensor) -> Tensor:
        """uint8 (b, H, W, 3) on the device → (b, …) float32."""

    @abstractmethod
    def to_bf16(self) -> None:
        """From now on compute in bf16 what may be."""

    def bits(self, images: Tensor) -> Tensor:
        """`rows` in the stored format."""
        return self.rows(images)


class LatentEncoder(FrameEncoder):
    """Posterior means of the VAE, normalised by its shift and scale, stored in bfloat16."""

    kind, stored = "latents", "bfloat16"

    @classmethod
    def of(cls, recipe: Recipe, device: Device) -> LatentEncoder:
        source = recipe.model.vae.weights
        if source is None:
            raise RecipeError(["model.vae.weights: is missing, and the latents of a random VAE are of no use"])
        vae = VAE.from_config(recipe.model.vae.model_copy(update={"latent": "mean"}), recipe.data.image_size)
        return cls(vae, vae.fingerprint(), source, device)

    def rows(self, images: Tensor) -> Tensor:
        rows: Tensor = self.model.encode(images)
        return rows

    def to_bf16(self) -> None:
        self.model.to(torch.bfloat16)

    def bits(self, images: Tensor) -> Tensor:
        return self.rows(images).to(torch.bfloat16).view(torch.int16)


class StateRows(FrameEncoder):
    """State tokens of a tokenizer, stored in float32. The compressor stays in fp32 or TF32, as in a policy's step."""

    kind, stored = "states", "float32"

    @classmethod
    def of(cls, recipe: Recipe, device: Device) -> StateRows:
        folder = recipe.policy.tokenizer
        if folder is None:
            raise RecipeError(
                ["policy.tokenizer: is missing: name the run folder of the tokenizer whose states to write"]
            )
        about = exported(folder)[1]
        sizes = (about["image_size"], about["model"]["encoder"]["image_size"])
        if recipe.data.image_size not in sizes:
            raise RecipeError(
                [f"data.image_size: frames of {recipe.data.image_size} px, but policy.tokenizer reads {sizes[0]} px"]
            )
        tokenizer = StateEncoder.from_pretrained(folder)
        return cls(tokenizer, tokenizer.fingerprint, folder, device)

    def rows(self, images: Tensor) -> Tensor:
        rows: Tensor = self.model.encode(images)
        return rows

    def to_bf16(self) -> None:
        self.model.encoder.to(torch.bfloat16)


def build(recipe: Recipe, device: Device) -> FrameEncoder:
    """A tokenizer's recipe's VAE, or a policy's recipe's tokenizer.

    Raises:
        RecipeError: It names no trained VAE, or no tokenizer that reads frames of this size.
        CheckpointError: The weights are missing or damaged.
    """
    return (StateRows if recipe.stage == "policy" else LatentEncoder).of(recipe, device)


def arithmetic_of(wanted: str | None, encoder: FrameEncoder, device: Device) -> Arithmetic:
    """`wanted`, or the default: states in fp32, latents in bf16 on a GPU, whose cache holds no more.

    Raises:
        RunError: There is no such arithmetic, or the device does not have it.
    """
    if wanted is None:
        return "bf16" if encoder.kind == "latents" and device.dtype() == torch.bfloat16 else "fp32"
    for known in ARITHMETIC:
        if known == wanted:
            if known == "tf32" and not device.is_gpu:
                raise RunError(f"--arithmetic tf32: {device.name} does not have it; fp32 and bf16 it has")
            return known
    raise RunError(f"--arithmetic {wanted}: must be one of {', '.join(ARITHMETIC)}")


@torch.no_grad()
def lowered(encoder: FrameEncoder, arithmetic: Arithmetic, device: Device, images: Tensor) -> float | None:
    """Have the encoder compute in `arithmetic` from now on; the relative error that this makes on `images`.

    Root of the mean square of the difference from fp32, over that of fp32's rows; None for fp32 itself.
    """
    device.allow_tf32(False)
    if arithmetic == "fp32":
        return None
    some = images[:COMPARED]
    exact = encoder.rows(some)
    device.allow_tf32(True)
    if arithmetic == "bf16":
        encoder.to_bf16()
    error = encoder.rows(some) - exact
    return float(error.square().mean().sqrt() / exact.square().mean().sqrt())


def function(encoder: FrameEncoder, *, compiled: bool, batch: int) -> Callable[[Tensor], Tensor]:
    """`bits`; compiled for batches of `batch` frames, up to which shorter ones are filled."""
    if not compiled:
        return encoder.bits
    run = torch.compile(encoder.bits, dynamic=False)

    def bits(images: Tensor) -> Tensor:
        count = len(images)
        if count < batch:
            images = torch.cat([images, images[-1:].expand(batch - count, *images.shape[1:])])
        rows: Tensor = run(images)
        return rows[:count]

    return bits
