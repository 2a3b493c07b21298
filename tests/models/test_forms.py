"""Weights in the forms people have them: what is loaded computes what the official code computes with them."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import IMAGE, SD3, SD35, VAE, shake

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers and timm
import timm
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from transformers import Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from stamo_dist.errors import CheckpointError, RecipeError
from stamo_dist.models import vae as vaes
from stamo_dist.models import weights
from stamo_dist.models.decoder import Decoder
from stamo_dist.models.encoder import Encoder
from stamo_dist.models.images import imagenet_normalise, resize, to_float
from stamo_dist.recipe import schema

SIZE = 70  # of the position tables: 5 × 5 patches
SMALL: dict[str, Any] = {"embed_dim": 192, "depth": 2, "num_heads": 3, "img_size": SIZE, "num_classes": 0}


def encoder(path: Path, size: int = SIZE, output: str = "patches", **config: Any) -> Encoder:
    cfg = {"weights": str(path), "image_size": size, "output": output, "config": config}
    return Encoder.from_config(schema.EncoderConfig.model_validate(cfg)).eval()


def pixels(frames: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    return imagenet_normalise(resize(to_float(frames), size))


def timm_model(name: str, **options: Any) -> Any:
    return shake(timm.create_model(name, pretrained=False, **SMALL, **options))


def timm_folder(folder: Path, name: str, model: Any) -> Path:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architecture": name, "num_features": SMALL["embed_dim"]}))
    return folder


@pytest.mark.parametrize("size", [SIZE, 42])
def test_registers_are_not_taken_for_patches(tmp_path: Path, frames: torch.Tensor, size: int) -> None:
    config = Dinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=14,
        image_size=SIZE,
        num_register_tokens=3,
    )
    theirs = shake(Dinov2WithRegistersModel(config))
    theirs.save_pretrained(tmp_path / "dino")
    with torch.no_grad():
        tokens = theirs(pixels(frames, size)).last_hidden_state
        ours = encoder(tmp_path / "dino", size)
        patches = (size // 14) ** 2
        assert tokens.shape[1] == 1 + 3 + patches
        torch.testing.assert_close(ours(frames), tokens[:, 4:], atol=0, rtol=0)
        torch.testing.assert_close(encoder(tmp_path / "dino", size, "cls")(frames), tokens[:, :1], atol=0, rtol=0)
        assert ours.untrained()(frames).shape == (len(frames), patches, 32)
        ours.save_pretrained(tmp_path / "saved")
        again = Dinov2WithRegistersModel.from_pretrained(tmp_path / "saved").eval()
        torch.testing.assert_close(again(pixels(frames, size)).last_hidden_state, tokens, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_giant_patch14_dinov2", {}),  # with the gated MLP
    ],
)
def test_timm_dinov2_gives_timms_tokens(tmp_path: Path, frames: torch.Tensor, name: str, options: dict) -> None:
    theirs = timm_model(name, **options)
    folder = timm_folder(tmp_path / "timm", name, theirs)
    with torch.no_grad():
        tokens = theirs.forward_features(pixels(frames))
        torch.testing.assert_close(encoder(folder)(frames), tokens[:, theirs.num_prefix_tokens :], atol=1e-5, rtol=1e-5)
        cls = encoder(folder / "model.safetensors", output="cls")(frames)
        torch.testing.assert_close(cls, tokens[:, :1], atol=1e-5, rtol=1e-5)


def meta(name: str, registers: int = 0) -> tuple[dict[str, torch.Tensor], Any]:
    """(a state dict by Meta's names, the timm module that timm's own converter makes of it)."""
    torch.manual_seed(0)
    module = timm_model(name)
    table = {f"{k}": torch.randn_like(v) * 0.1 for k, v in module.state_dict().items()}
    if registers:
        table["register_tokens"] = table.pop("reg_token")
        table["pos_embed"] = torch.randn(1, 1 + (SIZE // 14) ** 2, SMALL["embed_dim"]) * 0.1
    if "giant" in name:
        for key in [k for k in table if ".mlp." in k]:
            table[key.replace("fc1", "w12").replace("fc2", "w3")] = table.pop(key)
    table["mask_token"] = torch.randn(1, SMALL["embed_dim"])
    convert = timm.models.vision_transformer.checkpoint_filter_fn
    module.load_state_dict(convert(dict(table), module))
    return table, module


@pytest.mark.parametrize(
    ("name", "registers"),
    [("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4), ("vit_giant_patch14_dinov2", 0)],
)
def test_metas_pth_gives_the_same_tokens(tmp_path: Path, frames: torch.Tensor, name: str, registers: int) -> None:
    table, theirs = meta(name, registers)
    torch.save(table, tmp_path / "dinov2.pth")
    ours = encoder(tmp_path / "dinov2.pth")
    with torch.no_grad():
        tokens = theirs.forward_features(pixels(frames))
        torch.testing.assert_close(ours(frames), tokens[:, 1 + registers :], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.model.embeddings.mask_token, table["mask_token"])
    ours.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(encoder(tmp_path / "saved")(frames), ours(frames), atol=0, rtol=0)


class Foreign:
    """Something that only unpickling could make."""


def test_a_pth_that_holds_more_than_tensors_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({"teacher": Foreign()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"model.encoder.weights: .*x.pth is no map of tensors"):
        encoder(tmp_path / "x.pth")
    torch.save({"backbone.cls_token": torch.zeros(1, 1, 64)}, tmp_path / "y.pth")
    with pytest.raises(
        CheckpointError, match=r"y.pth does not hold that model \(its tensors: backbone.cls_token.*Meta"
    ):
        encoder(tmp_path / "y.pth")


def test_sharded_fp16_variants_are_read(tmp_path: Path, sd3, frames: torch.Tensor) -> None:
    """Rounded to half precision once, and then computed with in float32."""
    folder = tmp_path / "sd3"
    transformer, vae = sd3().half(), shake(AutoencoderKL(**VAE)).half()
    transformer.save_pretrained(folder / "transformer", variant="fp16", max_shard_size="40KB")
    vae.save_pretrained(folder / "vae", variant="fp16", max_shard_size="20KB")
    for part in ("transformer", "vae"):
        assert (folder / part / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
        assert not (folder / part / "diffusion_pytorch_model.safetensors").exists()
    ours = Decoder.from_folder(folder / "transformer", (4, 8, 8))
    for key, tensor in transformer.state_dict().items():
        assert torch.equal(ours.transformer.state_dict()[key], tensor.float()), key
    again = vaes.VAE.from_config(schema.VAEConfig(weights=str(folder)), IMAGE)
    with torch.no_grad():
        expected = vae.float().encode(again.pixels(frames)).latent_dist.mean
        torch.testing.assert_close(again.encode(frames), (expected - 0.0609) * 1.5305, atol=1e-5, rtol=1e-5)
    dino = shake(Dinov2Model(Dinov2Model.config_class(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)))
    dino.half().save_pretrained(tmp_path / "dino", variant="fp16", max_shard_size="40KB")
    assert (tmp_path / "dino" / "model.safetensors.index.fp16.json").is_file()
    assert torch.equal(encoder(tmp_path / "dino", 224).model.layernorm.weight, dino.layernorm.weight.float())


def single_file(path: Path, config: dict[str, Any]) -> tuple[SD3Transformer2DModel, AutoencoderKL]:
    """Write a file by the names of Stability AI, and what diffusers' own converters make of it."""
    torch.manual_seed(1)
    big = {**config, "num_attention_heads": 2, "attention_head_dim": 64, "caption_projection_dim": 128,
           "in_channels": 16, "out_channels": 16, "joint_attention_dim": 40, "pooled_projection_dim": 20}  # fmt: skip
    transformer = shake(SD3Transformer2DModel(**big))
    vae = shake(AutoencoderKL(**{**VAE, "latent_channels": 16, "block_out_channels": [32, 32, 64],
                                 "norm_num_groups": 32}))  # fmt: skip
    stored = {f"model.diffusion_model.{k}": v for k, v in original_sd3(transformer).items()}
    stored |= {f"first_stage_model.{k}": v for k, v in original_vae(vae).items()}
    stored["text_encoders.clip_l.logit_scale"] = torch.ones(1)
    save_file({k: v.contiguous() for k, v in stored.items()}, path)
    mine = {k: v.clone() for k, v in stored.items() if "first_stage" not in k and "text_enc" not in k}
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(mine)
    assert theirs.keys() == transformer.state_dict().keys()
    transformer.load_state_dict(theirs)
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(stored), vae.config))
    return transformer, vae


def original_sd3(model: SD3Transformer2DModel) -> dict[str, torch.Tensor]:
    """Random tensors by the original names, shaped as the model's."""
    width, depth = 128, model.config.num_layers
    draw = lambda *shape: torch.randn(shape) * 0.1  # noqa: E731
    state = model.state_dict()
    out = {"pos_embed": draw(*state["pos_embed.pos_embed"].shape)}
    pairs = {
        "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        **{f"{a}_embedder.mlp.{i}": f"time_text_embed.{b}_embedder.linear_{i // 2 + 1}"
           for a, b in (("t", "timestep"), ("y", "text")) for i in (0, 2)},
    }  # fmt: skip
    for i in range(depth):
        x, c, t = f"joint_blocks.{i}.x_block.", f"joint_blocks.{i}.context_block.", f"transformer_blocks.{i}."
        pairs |= {x + "attn.proj": t + "attn.to_out.0", x + "mlp.fc1": t + "ff.net.0.proj",
                  x + "mlp.fc2": t + "ff.net.2", x + "adaLN_modulation.1": t + "norm1.linear",
                  c + "adaLN_modulation.1": t + "norm1_context.linear"}  # fmt: skip
        if i < depth - 1:
            pairs |= {c + "attn.proj": t + "attn.to_add_out", c + "mlp.fc1": t + "ff_context.net.0.proj",
                      c + "mlp.fc2": t + "ff_context.net.2"}  # fmt: skip
        attentions = [x + "attn", c + "attn"]
        if t + "attn2.to_q.weight" in state:
            attentions.append(x + "attn2")
            pairs[x + "attn2.proj"] = t + "attn2.to_out.0"
        for attention in attentions:
            out |= {f"{attention}.qkv.weight": draw(3 * width, width), f"{attention}.qkv.bias": draw(3 * width)}
            if model.config.qk_norm:
                out |= {f"{attention}.ln_{n}.weight": draw(64) for n in "qk"}
    for theirs, ours in pairs.items():
        out |= {f"{theirs}.{kind}": draw(*state[f"{ours}.{kind}"].shape) for kind in ("weight", "bias")}
    return out


def original_vae(model: AutoencoderKL) -> dict[str, torch.Tensor]:
    """The model's own tensors by the original names."""
    changes = {
        **{f"up_blocks.{i}.": f"up.{2 - i}." for i in range(3)},
        **{f"down_blocks.{i}.": f"down.{i}." for i in range(3)},
        **{f"mid_block.resnets.{i}.": f"mid.block_{i + 1}." for i in range(2)}, "resnets": "block",
        "samplers.0.": "sample.", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
        "mid_block.attentions.0.": "mid.attn_1.", "group_norm": "norm", "to_out.0": "proj_out",
        **{f"to_{n}.": f"{n}." for n in "qkv"},
    }  # fmt: skip
    out = {}
    for key, value in model.state_dict().items():
        name = reduce(lambda said, change: said.replace(*change), changes.items(), key)
        convolution = "mid.attn_1." in name and value.ndim == 2
        out[name] = value[:, :, None, None] if convolution else value
    return out


@pytest.mark.parametrize("config", [SD3, SD35])
def test_single_file_sd3_is_what_diffusers_makes_of_it(
    tmp_path: Path, frames: torch.Tensor, config: dict[str, Any]
) -> None:
    file = tmp_path / "sd3_medium.safetensors"
    transformer, vae = single_file(file, config)
    found = weights.find(str(file), "decoder", "model.decoder.weights")
    ours = Decoder.from_checkpoint(found, (16, 8, 8))
    assert ours.transformer.state_dict().keys() == transformer.state_dict().keys()
    for key, tensor in transformer.state_dict().items():
        assert torch.equal(ours.transformer.state_dict()[key], tensor), key
    z, tokens = torch.randn(2, 16, 8, 8), torch.randn(2, 3, 40)
    how = {"timestep": torch.tensor([100.0, 900.0]), "pooled_projections": torch.randn(2, 20), "return_dict": False}
    with torch.no_grad():
        expected = transformer(z, tokens, **how)[0]
        torch.testing.assert_close(ours.transformer(z, tokens, **how)[0], expected, atol=1e-5, rtol=1e-5)
        again = vaes.VAE.from_config(schema.VAEConfig(weights=str(file)), IMAGE)
        mean = vae.encode(again.pixels(frames)).latent_dist.mean
        torch.testing.assert_close(again.encode(frames), (mean - 0.0609) * 1.5305, atol=1e-5, rtol=1e-5)
        decoded = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(again.decode(again.encode(frames)), decoded, atol=1e-5, rtol=1e-5)
    again.save_pretrained(tmp_path / "vae")
    assert vaes.VAE.from_folder(tmp_path / "vae", IMAGE).fingerprint() == again.fingerprint()


def test_parts_of_a_single_file_are_read_when_they_are_needed(tmp_path: Path) -> None:
    """A process that holds a shard asks for its rows alone."""
    file = tmp_path / "sd3.safetensors"
    transformer, _ = single_file(file, SD3)
    stored = weights.find(str(file), "decoder", "model.decoder.weights").stored
    for key in ("transformer_blocks.1.attn.to_k.weight", "norm_out.linear.weight", "proj_out.bias"):
        rows = stored[key].read((slice(3, 9), *[slice(None)] * (len(stored[key].shape) - 1)))
        assert torch.equal(rows, transformer.state_dict()[key][3:9]), key


def test_what_cannot_be_read_says_how_to_convert_it(tmp_path: Path, official: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other.safetensors does not hold .*from_single_file\(FILE\)"):
        weights.find(str(tmp_path / "other.safetensors"), "decoder", "model.decoder.weights")
    with pytest.raises(CheckpointError, match=r"if you mean other.safetensors, set model.vae.weights: .*/other.safe"):
        weights.find(str(tmp_path), "vae", "model.vae.weights")
    (tmp_path / "sd.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"sd.ckpt is no folder, nor a file .safetensors or .pth"):
        weights.find(str(tmp_path / "sd.ckpt"), "vae", "model.vae.weights")
    plain = load_file(official / "sd3/vae/diffusion_pytorch_model.safetensors")
    save_file({f"first_stage_model.{k}": v for k, v in plain.items()}, tmp_path / "sd15.safetensors")
    with pytest.raises(CheckpointError, match=r"AutoencoderKL.from_single_file"):
        weights.find(str(tmp_path / "sd15.safetensors"), "vae", "model.vae.weights")


def test_a_config_beside_weights_must_be_theirs(official: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.encoder.config.hidden_size: 768, but .*/dino has 32"):
        encoder(official / "dino", hidden_size=768)
    assert encoder(official / "dino", hidden_size=32).dim == 32
