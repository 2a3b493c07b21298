"""OpenVLA's vision: DINOv2 and SigLIP towers (timm) side by side, and OFT's FiLM conditioning of their blocks."""

from __future__ import annotations

from typing import Any

import stamo_dist.models.openvla._timm  # noqa: F401  # isort: skip  must precede timm
import timm
import torch
from timm.layers import LayerScale as TimmLayerScale
from torch import Tensor, nn

from stamo_dist.errors import CheckpointError
from stamo_dist.models.openvla.config import Tower
from stamo_dist.models.recompute import run_block


class LayerScale(nn.Module):
    """timm's LayerScale with the checkpoints' parameter name: transformers used to rename parameters with "gamma"."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.scale_factor = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class _Modulation(nn.Linear):
    """A Linear that starts at zero, so that a fresh FiLM changes nothing."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class FiLMBlock(nn.Module):
    """A ViT block whose tokens are scaled and shifted by the language between its attention and its MLP half."""

    def __init__(self, block: Any, language: int):
        super().__init__()
        self.block: Any = block
        dim = block.norm1.normalized_shape[0]
        self.scale = _Modulation(language, dim)
        self.shift = _Modulation(language, dim)

    def forward(self, x: Tensor, language: Tensor) -> Tensor:
        """Tokens (B, N, dim) and a language embedding (B, H) → (B, N, dim)."""
        b = self.block
        x = x + b.drop_path1(b.ls1(b.attn(b.norm1(x))))
        x = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        return x + b.drop_path2(b.ls2(b.mlp(b.norm2(x))))


class VisionBackbone(nn.Module):
    """Pixels → patch features of the second-to-last block of each tower, without the final norm.

    The last block, the final norm and SigLIP's pooling are in the checkpoints but unused; they are frozen.
    """

    def __init__(self, towers: tuple[Tower, ...], language: int | None = None):
        """`language` is the width of the language embedding for FiLM; None leaves the blocks as they are."""
        super().__init__()
        self.featurizer: Any
        self.fused_featurizer: Any
        self.film = language is not None
        self.recompute = 0  # one block of so many; 0: none
        self.featurizer = _build(towers[0], language)
        self.fused_featurizer = _build(towers[1], language) if len(towers) > 1 else None

    @property
    def towers(self) -> list[Any]:
        return [t for t in (self.featurizer, self.fused_featurizer) if t is not None]

    @property
    def dim(self) -> int:
        """Dimension D of a patch feature."""
        return sum(int(t.embed_dim) for t in self.towers)

    @property
    def patches(self) -> int:
        """Patches N of one image."""
        return int(self.featurizer.patch_embed.num_patches)

    def forward(self, pixels: Tensor, language: Tensor | None = None) -> Tensor:
        """(B, 3·towers·V, S, S) normalised pixels of V views → (B, V·N, D); `language` (B, H) with FiLM.

        Raises:
            ValueError: the number of channels is no multiple of three for each tower.
        """
        towers = self.towers
        if pixels.shape[1] % (3 * len(towers)):
            raise ValueError(f"pixel_values has {pixels.shape[1]} channels, not {3 * len(towers)} for each view")
        views = pixels.shape[1] // (3 * len(towers))
        images = pixels.unflatten(1, (views, len(towers), 3)).flatten(0, 1)
        if language is not None:
            language = language.repeat_interleave(views, dim=0)
        features = [self.patch_features(tower, images[:, i], language) for i, tower in enumerate(towers)]
        return torch.cat(features, dim=-1).unflatten(0, (-1, views)).flatten(1, 2)

    def patch_features(self, tower: Any, pixels: Tensor, language: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) → (B, N, dim of the tower)."""
        x = tower.patch_embed(pixels.to(tower.patch_embed.proj.weight.dtype))
        x = tower.norm_pre(tower.patch_drop(tower._pos_embed(x)))
        condition = () if language is None else (language.to(x.dtype),)
        for i, block in enumerate(tower.blocks[:-1]):
            x = run_block(block, i, self.recompute, x, *condition)
        return x[:, tower.num_prefix_tokens :]


def _build(tower: Tower, language: int | None) -> Any:
    options = {"img_size": tower.image_size, "act_layer": tower.act_layer, **tower.options}
    try:
        model: Any = timm.create_model(tower.model, pretrained=False, num_classes=0, **options)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise CheckpointError(f"timm_model_ids: timm cannot build {tower.model} with {options} ({error})") from error
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TimmLayerScale):
                setattr(module, name, LayerScale(child.gamma.detach()))
    unused = [model.blocks[-1], model.norm, model.attn_pool]
    if language is not None:
        model.blocks = nn.ModuleList(FiLMBlock(block, language) for block in model.blocks)
        unused[0] = model.blocks[-1]
    for module in filter(None, unused):
        module.requires_grad_(False)
    return model
