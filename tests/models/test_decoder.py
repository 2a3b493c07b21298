from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from stamo_dist.errors import RecipeError
from stamo_dist.models.decoder import Decoder
from stamo_dist.recipe import schema

LATENT = (4, 8, 8)


def from_weights(folder: Path, tokens: int, dim: int) -> Decoder:
    state = schema.CompressorConfig(tokens=tokens, dim=dim, width=32, depth=1, heads=2)
    return Decoder.from_config(schema.DecoderConfig(weights=str(folder)), state, LATENT).eval()


@pytest.mark.parametrize("version", ["sd3", "sd3.5"])
@pytest.mark.parametrize("sharded", [False, True])
def test_same_conditioning_shapes_give_the_official_model(
    sd3: Callable[..., SD3Transformer2DModel], tmp_path: Path, configs: dict, version: str, sharded: bool
) -> None:
    theirs = sd3(configs[version], joint=24, pooled=48)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="60KB" if sharded else "5GB")
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == sharded
    ours = from_weights(tmp_path, tokens=2, dim=24)
    assert ours.report is not None
    assert not ours.report.reinitialised
    assert set(ours.report.loaded) == set(theirs.state_dict())

    z, sigma, tokens = torch.randn(3, *LATENT), torch.tensor([1.0, 0.5, 0.01]), torch.randn(3, 2, 24)
    with torch.no_grad():
        expected = theirs(z, tokens, tokens.flatten(1), sigma * 1000).sample
        torch.testing.assert_close(ours(z, sigma, tokens), expected, atol=0, rtol=0)


def test_layers_of_another_shape_are_reinitialised_and_reported(
    sd3: Callable[..., SD3Transformer2DModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = sd3(joint=40, pooled=20)
    theirs.save_pretrained(tmp_path)
    ours = from_weights(tmp_path, tokens=2, dim=24)
    assert ours.report is not None
    assert ours.report.reinitialised == {
        "context_embedder.weight": ((32, 40), (32, 24)),
        "context_embedder.bias": ((32,), (32,)),
        "time_text_embed.text_embedder.linear_1.weight": ((32, 20), (32, 48)),
        "time_text_embed.text_embedder.linear_1.bias": ((32,), (32,)),
    }
    assert "context_embedder.weight: [32, 40] in the checkpoint, [32, 24] in the model" in caplog.text
    state = ours.transformer.state_dict()
    for key, tensor in theirs.state_dict().items():
        assert (key in ours.report.reinitialised) != torch.equal(state[key], tensor), key
    # The pooled projection alone keeps SD3's weights where tokens × dim happens to fit.
    assert set(from_weights(tmp_path, tokens=1, dim=20).report.reinitialised) == {
        "context_embedder.weight",
        "context_embedder.bias",
    }


def test_half_precision_checkpoints_become_float32(sd3: Callable[..., SD3Transformer2DModel], tmp_path: Path) -> None:
    theirs = sd3(joint=24, pooled=48).half()
    theirs.save_pretrained(tmp_path)
    ours = from_weights(tmp_path, tokens=2, dim=24)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.transformer.proj_out.weight, theirs.proj_out.weight.float())


def test_random_decoder_starts_at_zero_velocity_and_fits_the_latents() -> None:
    state = schema.CompressorConfig(tokens=3, dim=16, width=32, depth=1, heads=2)
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 1}
    decoder = Decoder.from_config(schema.DecoderConfig(config=small), state, (5, 6, 6))
    config = decoder.transformer.config
    assert (config.in_channels, config.pos_embed_max_size, config.joint_attention_dim) == (5, 6, 16)
    velocity = decoder(torch.randn(2, 5, 6, 6), torch.rand(2), torch.randn(2, 3, 16))
    assert velocity.shape == (2, 5, 6, 6)
    assert velocity.abs().max() == 0


def test_unfit_configurations_name_every_field(official: Path) -> None:
    state = schema.CompressorConfig(tokens=2, dim=24, width=32, depth=1, heads=2)
    wrong = {"num_layer": 2, "joint_attention_dim": 24}
    with pytest.raises(RecipeError) as error:
        Decoder.from_config(schema.DecoderConfig(config=wrong), state, LATENT)
    assert "did you mean num_layers" in str(error.value)
    assert "joint_attention_dim: is derived from model.compressor.dim" in str(error.value)
    with pytest.raises(RecipeError) as error:
        Decoder.from_config(schema.DecoderConfig(weights=str(official / "sd3")), state, (16, 31, 31))
    assert "in_channels and out_channels are 4 and 4, the VAE has 16" in str(error.value)
    assert "patch_size 2 does not divide the latents' side 31" in str(error.value)
    assert "pos_embed_max_size 12 is less than the 15 patches of a side" in str(error.value)


def test_sigma_must_not_be_cast(official: Path) -> None:
    decoder = from_weights(official / "sd3", tokens=2, dim=24)
    with pytest.raises(TypeError, match="must not cast"):
        decoder(torch.randn(1, *LATENT), torch.tensor([0.5], dtype=torch.bfloat16), torch.randn(1, 2, 24))


def test_diffusers_opens_what_is_saved(official: Path, tmp_path: Path) -> None:
    ours = from_weights(official / "sd3", tokens=2, dim=24)
    ours.save_pretrained(tmp_path)
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path, local_files_only=True)
    assert json.loads((tmp_path / "config.json").read_text())["joint_attention_dim"] == 24
    for key, tensor in ours.transformer.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], tensor), key
