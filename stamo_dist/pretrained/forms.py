"""Mapping checkpoints with other tensor names to the names of transformers and diffusers.

DINOv2 as Meta publishes it (.pth) and as timm does, and Stable Diffusion 3 in a single file. Sizes are derived from
shapes, as these files have no config.json that our classes read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from stamo_dist.pretrained.files import Shape

_HEAD = 64  # width of an attention head, in every DINOv2 and every SD3
_SD3 = "model.diffusion_model."
_SD3_VAE = "first_stage_model."
_SD3_CHANNELS = 16


class Span(NamedTuple):
    """Rows `start` to `stop` of a stored tensor; zeros if it has no key."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor of the model: spans of stored tensors, concatenated along `axis` and viewed in this shape."""

    shape: Shape
    spans: tuple[Span, ...]
    axis: int = 0

    @classmethod
    def whole(cls, key: str, shape: Shape) -> JoinedTensor:
        return cls(shape, (Span(key, 0, shape[0] if shape else 1),))


Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class CheckpointForm:
    """A checkpoint by the names of our classes. Tensors without a rule keep their name, unknown to the model."""

    config: dict[str, Any]
    parts: dict[str, JoinedTensor]


def dinov2(shapes: Shapes) -> CheckpointForm | None:
    """DINOv2 by the names of Meta and of timm, with or without registers; None if it is another model."""
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= set(shapes):
        return None
    width, patch = shapes["cls_token"][-1], shapes["patch_embed.proj.weight"][-1]
    in_class = "reg_token" in shapes  # timm adds the class token's position to the token, where there are registers
    positions = shapes["pos_embed"][1] - (not in_class)
    registers = shapes.get("register_tokens", shapes.get("reg_token", (1, 0, width)))[1]
    inner = shapes.get("blocks.0.mlp.w12.weight", shapes.get("blocks.0.mlp.fc1.weight", (0,)))[0]
    outer = shapes.get("blocks.0.mlp.w3.weight", shapes.get("blocks.0.mlp.fc2.weight", (0, 0)))[-1]
    gated = inner == 2 * outer
    config: dict[str, Any] = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": width,
        "num_hidden_layers": _depth(shapes, "blocks."),
        "num_attention_heads": width // _HEAD,
        "mlp_ratio": 4 if gated else inner // width,
        "use_swiglu_ffn": gated,
        "patch_size": patch,
        "image_size": patch * math.isqrt(positions),
    }
    if registers:
        config["num_register_tokens"] = registers
    parts: dict[str, JoinedTensor] = {
        "embeddings.mask_token": JoinedTensor((1, width), (Span("", 0, 1),))
    }  # timm drops it
    for key, shape in shapes.items():
        parts.update(_dinov2_parts(key, shape, gated))
    if in_class:
        spans = (Span("", 0, 1), Span("pos_embed", 0, positions))
        parts["embeddings.position_embeddings"] = JoinedTensor((1, positions + 1, width), spans, axis=1)
    return CheckpointForm(config, parts)


_DINOV2 = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "norm1",
    "norm2": "norm2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_IN, _OUT = "mlp.weights_in", "mlp.weights_out"
_GATED = {"mlp.w12": _IN, "mlp.fc1": _IN, "mlp.w3": _OUT, "mlp.fc2": _OUT}


def _dinov2_parts(key: str, shape: Shape, gated: bool) -> Iterator[tuple[str, JoinedTensor]]:
    block, name, kind = _split(key, r"blocks\.(\d+)\.")
    prefix = f"encoder.layer.{block}." if block else ""
    if name == "attn.qkv":
        yield from _thirds(key, shape, [f"{prefix}attention.attention.{n}{kind}" for n in ("query", "key", "value")])
        return
    known = {**_DINOV2, **(_GATED if gated else {})}
    yield prefix + known[name] + kind if name in known else key, JoinedTensor.whole(key, shape)


def sd3(shapes: Shapes) -> CheckpointForm | None:
    """The transformer in a single file of Stable Diffusion 3 or 3.5; None if there is none."""
    found = {k.removeprefix(_SD3): v for k, v in shapes.items() if k.startswith(_SD3)} or dict(shapes)
    if not {"x_embedder.proj.weight", "joint_blocks.0.x_block.attn.qkv.weight", "pos_embed"} <= set(found):
        return None
    origin = _SD3 if any(k.startswith(_SD3) for k in shapes) else ""
    width, channels, patch, _ = found["x_embedder.proj.weight"]
    depth = _depth(found, "joint_blocks.")
    config: dict[str, Any] = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "num_layers": depth,
        "num_attention_heads": width // _HEAD,
        "attention_head_dim": _HEAD,
        "caption_projection_dim": width,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": found.get("final_layer.linear.weight", (0,))[0] // patch**2,
        "pos_embed_max_size": math.isqrt(found["pos_embed"][1]),
        "joint_attention_dim": found.get("context_embedder.weight", (0, 0))[1],
        "pooled_projection_dim": found.get("y_embedder.mlp.0.weight", (0, 0))[1],
        "dual_attention_layers": sorted({int(k.split(".")[1]) for k in found if ".attn2." in k}),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in found else None,
    }
    parts: dict[str, JoinedTensor] = {}
    for key, shape in found.items():
        parts.update(_sd3_parts(key, origin + key, shape, depth - 1))
    return CheckpointForm(config, parts)


_SD3_NAMES = {
    "pos_embed": "pos_embed.pos_embed", "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    "x_block.attn.proj": "attn.to_out.0", "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q", "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}  # fmt: skip
_SD3_FUSED = {
    "x_block.attn.qkv": [f"attn.to_{n}" for n in "qkv"],
    "x_block.attn2.qkv": [f"attn2.to_{n}" for n in "qkv"],
    "context_block.attn.qkv": [f"attn.add_{n}_proj" for n in "qkv"],
}


def _sd3_parts(key: str, stored: str, shape: Shape, last: int) -> Iterator[tuple[str, JoinedTensor]]:
    block, name, kind = _split(key, r"joint_blocks\.(\d+)\.")
    prefix = f"transformer_blocks.{block}." if block else ""
    if name in _SD3_FUSED:
        yield from _thirds(stored, shape, [prefix + n + kind for n in _SD3_FUSED[name]])
    elif name == "final_layer.adaLN_modulation.1" or (name, block) == ("context_block.adaLN_modulation.1", f"{last}"):
        half = shape[0] // 2  # order in the file: shift, scale; ours: scale, shift
        spans = (Span(stored, half, 2 * half), Span(stored, 0, half))
        yield prefix + _SD3_NAMES[name] + kind, JoinedTensor(shape, spans)
    else:
        yield prefix + _SD3_NAMES[name] + kind if name in _SD3_NAMES else key, JoinedTensor.whole(stored, shape)


def sd3_vae(shapes: Shapes) -> CheckpointForm | None:
    """The VAE in a single file of Stable Diffusion 3 or 3.5; None if there is none."""
    found = {k.removeprefix(_SD3_VAE): v for k, v in shapes.items() if k.startswith(_SD3_VAE)}
    channels = found.get("decoder.conv_in.weight", (0, 0))[1]
    # Other models' VAEs have these names too, but other scaling.
    if channels != _SD3_CHANNELS or f"{_SD3}joint_blocks.0.x_block.attn.qkv.weight" not in shapes:
        return None
    levels = _depth(found, "encoder.down.")
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "latent_channels": channels,
        "sample_size": 1024,
        "block_out_channels": [found[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _depth(found, "encoder.down.0.block."),
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in found,
        "use_post_quant_conv": "post_quant_conv.weight" in found,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "force_upcast": True,
    }
    parts: dict[str, JoinedTensor] = {}
    for key, shape in found.items():
        flat = shape[:2] if ".mid.attn_1." in key and len(shape) == 4 else shape  # 1 × 1 convolutions in the file
        parts[_sd3_vae_name(key, levels)] = JoinedTensor(flat, JoinedTensor.whole(_SD3_VAE + key, shape).spans)
    return CheckpointForm(config, parts)


_VAE_NAMES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up_blocks\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up_blocks\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def _sd3_vae_name(key: str, levels: int) -> str:
    key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", key)  # numbered in reverse
    for pattern, name in _VAE_NAMES:
        key = re.sub(pattern, name, key)
    return key


def _split(key: str, numbered: str) -> tuple[str, str, str]:
    """(number of the block or "", the layer's name, ".weight", ".bias" or "")."""
    match = re.match(numbered, key)
    block, rest = (match[1], key[match.end() :]) if match else ("", key)
    stem, dot, kind = rest.rpartition(".")
    return (block, stem, dot + kind) if kind in ("weight", "bias") else (block, rest, "")


def _thirds(key: str, shape: Shape, names: list[str]) -> Iterator[tuple[str, JoinedTensor]]:
    """Split a fused layer into equal row ranges, one per name."""
    rows = shape[0] // len(names)
    for i, name in enumerate(names):
        yield name, JoinedTensor((rows, *shape[1:]), (Span(key, i * rows, (i + 1) * rows),))


def _depth(shapes: Shapes, prefix: str) -> int:
    """Number of blocks under a prefix."""
    return 1 + max(int(k[len(prefix) :].partition(".")[0]) for k in shapes if k.startswith(prefix))
