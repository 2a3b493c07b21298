"""Configurations of released checkpoints, so that planning needs none of their files."""

from __future__ import annotations

from typing import Any

from stamo_dist.errors import RecipeError
from stamo_dist.models.openvla.config import OPENVLA_7B
from stamo_dist.models.weights import opened
from stamo_dist.pretrained.place import cached, hub_id, on_disk
from stamo_dist.pretrained.reading import KINDS, is_timm, read_json
from stamo_dist.pretrained.wanted import adapter_base

_DINOV2: dict[str, Any] = {"image_size": 518, "patch_size": 14}
_SIZES = {
    size: {**_DINOV2, "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    for size, width, depth, heads in (("small", 384, 12, 6), ("base", 768, 12, 12), ("large", 1024, 24, 16))
}
_REGISTERS = {"num_register_tokens": 4}
_SD3: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
_SD3_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
_MEDIUM = ("stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai/stable-diffusion-3-medium")
#: Part of the model → hub id → fields of its config.json that differ from the class's defaults.
KNOWN: dict[str, dict[str, dict[str, Any]]] = {
    "encoder": {
        **{f"facebook/dinov2-{size}": config for size, config in _SIZES.items()},
        **{f"facebook/dinov2-with-registers-{size}": config | _REGISTERS for size, config in _SIZES.items()},
    },
    "decoder": dict.fromkeys(_MEDIUM, _SD3),
    "vae": dict.fromkeys(_MEDIUM, _SD3_VAE),
    "policy": {"openvla/openvla-7b": OPENVLA_7B},
}
#: The paper's tokenizer, for policies whose tokenizer is not trained yet.
PAPER = {"encoder": KNOWN["encoder"]["facebook/dinov2-large"], "decoder": _SD3, "vae": _SD3_VAE}


def config_of(part: str, weights: str, field: str) -> dict[str, Any]:
    """The configuration of the checkpoint `weights`: from its folder or file, or of a known release.

    Raises:
        RecipeError: It is a hub id that is neither cached nor known.
        CheckpointError: It should be on this machine, and is missing, damaged or of another model.
    """
    if part == "policy":
        weights = adapter_base(weights) or weights
    hub, subfolders = hub_id(weights), KINDS[part].subfolders
    path = on_disk(weights, subfolders, field) if hub is None else cached(*hub, subfolders)
    if path is not None and path.is_dir() and not is_timm(path, field):
        return read_json(path / "config.json", field)
    if path is not None:
        return opened(path, part, field).config
    assert hub is not None, "what is no hub id is on disk"
    if hub[0] not in KNOWN[part]:
        known = ", ".join(KNOWN[part])
        raise RecipeError(
            [f"{field}: there is no config.json in {weights}, and its sizes are not known; known: {known}"]
        )
    return KNOWN[part][hub[0]]
