from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from transformers import Dinov2Model

from stamo_dist.errors import CheckpointError, RecipeError
from stamo_dist.models.flow import interpolate
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe import schema

Build = Callable[..., Tokenizer]


def loss(tokenizer: Tokenizer, frames: Tensor, core: torch.nn.Module | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    z0 = tokenizer.latents(frames)
    noise = torch.randn(z0.shape, generator=generator)
    sigma = torch.rand(len(z0), generator=generator)
    z = interpolate(z0, noise, sigma)
    velocity, straight = (core or tokenizer.trained)(tokenizer.features(frames), z, sigma)
    assert straight is None
    assert velocity.shape == z0.shape
    assert velocity.dtype == torch.float32
    return (velocity - (noise - z0)).square().mean()


def test_states_are_normed_and_repeatable(tokenizer: Build, frames: Tensor) -> None:
    model = tokenizer().eval()
    state = model.encode(frames)
    assert state.shape == (3, 2, 24)
    torch.testing.assert_close(state.mean(-1), torch.zeros(3, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(state.norm(dim=-1), torch.full((3, 2), 24**0.5), atol=0, rtol=1e-3)
    assert not torch.allclose(state[:, 0], state[:, 1])  # the queries are not one
    assert not torch.allclose(state[0], state[1])
    torch.testing.assert_close(model.encode(frames[1:2]), state[1:2])  # whatever else is in the batch


def test_decoding_is_reproducible_given_the_noise(tokenizer: Build, frames: Tensor) -> None:
    model = tokenizer().eval()
    state, noise = model.encode(frames), torch.randn(3, *model.latent_shape)
    images = model.decode(state, noise=noise)
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, model.decode(state, steps=3, noise=noise))  # the recipe's steps
    assert not torch.equal(images, model.decode(state, steps=1, noise=noise))
    assert not torch.equal(images, model.decode(state.flip(0), noise=noise))  # the state matters


@pytest.mark.parametrize("weights", [True, False], ids=["frozen encoder", "joint encoder"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trained_parameter_and_nothing_else_gets_a_gradient(
    tokenizer: Build, frames: Tensor, weights: bool, checkpointing: bool
) -> None:
    model = tokenizer(weights).train()
    model.trained.set_gradient_checkpointing(checkpointing)
    loss(model, frames).backward()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in model.named_parameters() if p.grad is not None}
    if weights:  # (a random decoder starts at zero velocity, so only its last layer learns from the first step)
        still = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
        # The last block drops its context, so its context queries do nothing; they exist in every SD3 checkpoint.
        last = "trained.decoder.transformer.transformer_blocks.1.attn."
        assert still == {last + "add_q_proj.weight", last + "add_q_proj.bias"}
    outside = {n for n, _ in model.named_parameters() if not n.startswith("trained.")}
    mask_token = {"trained.encoder.model.embeddings.mask_token"} if not weights else set()
    assert trainable == {n for n, _ in model.named_parameters()} - outside - mask_token
    assert not model.vae.training
    assert model.encoder.training is not weights


def test_gradient_checkpointing_changes_no_gradient(tokenizer: Build, frames: Tensor) -> None:
    gradients = []
    for every in (0, 1, 2):
        model = tokenizer(weights=False).train()
        model.trained.set_gradient_checkpointing(every)
        loss(model, frames).backward()
        gradients.append({n: p.grad for n, p in model.trained.named_parameters()})
    for name, gradient in gradients[0].items():
        for recomputed in gradients[1:]:
            same = recomputed[name] is None if gradient is None else torch.equal(gradient, recomputed[name])
            assert same, name


@pytest.mark.parametrize("weights", [True, False], ids=["frozen encoder", "joint encoder"])
def test_bf16_by_autocast_and_by_casting_agree_with_fp32(tokenizer: Build, frames: Tensor, weights: bool) -> None:
    exact = loss(tokenizer(weights), frames)
    model = tokenizer(weights)
    model.freeze("cpu", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = loss(model, frames)
    autocast.backward()
    model.trained.to(torch.bfloat16)
    cast = loss(model, frames)
    cast.backward()
    assert autocast.item() == pytest.approx(exact.item(), rel=0.02)
    assert cast.item() == pytest.approx(exact.item(), rel=0.02)
    assert model.decode(model.encode(frames)).dtype == torch.float32


def test_compiled_blocks_are_shared_and_compute_the_same(tokenizer: Build, frames: Tensor, monkeypatch) -> None:
    compiled = []

    def graphs(graph: torch.fx.GraphModule, _: list) -> Callable:
        compiled.append(graph)
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: original(f, backend=graphs, fullgraph=True))
    plain, model = tokenizer().train(), tokenizer().train()
    names = list(model.trained.state_dict())
    model.compile_blocks()
    assert list(model.trained.state_dict()) == names
    torch.testing.assert_close(loss(model, frames), loss(plain, frames))
    # Two compressor layers (the last keeps fewer tokens), two transformer blocks (the last drops its context), two
    # DINOv2 layers that are alike, one VAE encoder.
    assert len(compiled) == 6


@pytest.mark.parametrize("weights", [True, False], ids=["frozen encoder", "joint encoder"])
def test_saving_and_loading_is_exact(tokenizer: Build, frames: Tensor, tmp_path: Path, weights: bool) -> None:
    model = tokenizer(weights).eval()
    with torch.no_grad():
        for p in model.trained.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "run" / "model")
    again = Tokenizer.from_pretrained(tmp_path / "run")
    assert again.cfg == model.cfg
    assert again.flow == model.flow
    assert again.fingerprint() == model.fingerprint()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    noise = torch.randn(3, *model.latent_shape)
    assert torch.equal(again.encode(frames), model.encode(frames))
    assert torch.equal(again.decode(again.encode(frames), noise=noise), model.decode(model.encode(frames), noise=noise))

    folder = tmp_path / "run" / "model"
    transformer = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert torch.equal(transformer.proj_out.weight, model.trained.decoder.transformer.proj_out.weight)
    assert torch.equal(AutoencoderKL.from_pretrained(folder, subfolder="vae").decoder.conv_out.bias, _bias(model))
    assert (folder / "encoder").exists() is not weights
    if not weights:
        features = Dinov2Model.from_pretrained(folder / "encoder")
        assert torch.equal(features.layernorm.bias, model.encoder.model.layernorm.bias)


def _bias(model: Tokenizer) -> Tensor:
    return model.vae.model.decoder.conv_out.bias


def test_another_frozen_encoder_is_refused(tokenizer: Build, official: Path, tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "model")
    moved = shutil.copytree(official / "dino", tmp_path / "dino")
    Tokenizer.from_pretrained(tmp_path, encoder_weights=str(moved))
    other = Dinov2Model.from_pretrained(moved)
    other.layernorm.bias.data[0] += 1
    other.save_pretrained(moved)
    with pytest.raises(CheckpointError, match="the encoder is not the one this tokenizer was trained with"):
        Tokenizer.from_pretrained(tmp_path, encoder_weights=str(moved))


def test_incomplete_exports_are_refused(tokenizer: Build, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no stamo.json"):
        Tokenizer.from_pretrained(tmp_path)
    model = tokenizer(False)
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "stamo.json").read_text())
    (tmp_path / "stamo.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "stamo.json").write_text(json.dumps({k: v for k, v in about.items() if k != "flow"}))
    with pytest.raises(CheckpointError, match=r"stamo.json: cannot be read \(KeyError: 'flow'\)"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "stamo.json").write_text(json.dumps(about))
    (tmp_path / "compressor" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="compressor has no"):
        Tokenizer.from_pretrained(tmp_path)
    model.freeze("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match=r"were cast to torch\.bfloat16"):
        model.save_pretrained(tmp_path)


def test_fingerprint_follows_the_weights(tokenizer: Build) -> None:
    model = tokenizer()
    before, frozen = model.fingerprint(), dict(model.frozen_fingerprints())
    assert tokenizer().fingerprint() == before
    model.freeze("cpu", torch.bfloat16)
    assert model.fingerprint() == before  # casting the frozen parts does not make another tokenizer
    model.trained.compressor.queries.data[0, 0] += 1
    assert model.fingerprint() != before
    assert model.frozen_fingerprints() == frozen


def test_a_straight_map_is_trained_and_is_no_part_of_the_tokenizer(
    model_cfg: Callable[..., schema.Model], frames: Tensor, tmp_path: Path
) -> None:
    cfg = model_cfg(weights=False)
    compressor = cfg.compressor.model_copy(update={"straighten": 0.5, "norm": False})
    cfg = cfg.model_copy(update={"compressor": compressor})
    model = Tokenizer.from_config(cfg, schema.Flow(), frames.shape[1])
    z0 = model.latents(frames)
    with torch.no_grad():
        model.trained.straight.weight.normal_()
    _, guess = model.trained(frames, z0, torch.rand(3))
    state = model.trained.state(frames)
    expected = state.flatten(1) @ model.trained.straight.weight.T + model.trained.straight.bias
    torch.testing.assert_close(guess.flatten(1), expected)
    assert not torch.allclose(state.norm(dim=-1), torch.full((3, 2), 24**0.5), rtol=1e-3)
    (guess - z0).square().mean().backward()
    assert model.trained.compressor.queries.grad.abs().sum() > 0

    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(frames), model.eval().encode(frames))
    assert again.fingerprint() == model.fingerprint()


def test_unknown_fields_of_all_parts_are_reported_together() -> None:
    cfg = schema.Model(
        encoder=schema.EncoderConfig(config={"hidden_sise": 8}, image_size=40, train=True),
        decoder=schema.DecoderConfig(config={"layers": 1}),
        vae=schema.VAEConfig(config={"channels": 4}),
    )
    with pytest.raises(RecipeError) as error:
        Tokenizer.from_config(cfg, schema.Flow(), 32)
    assert len(error.value.problems) == 4
    assert "model.encoder.config.hidden_sise: unknown field; did you mean hidden_size" in str(error.value)


def test_notes_name_sources_and_reinitialised_layers(tokenizer: Build, official: Path) -> None:
    notes = "\n".join(tokenizer().notes)
    assert f"model.encoder: {official / 'dino'}" in notes
    assert "re-initialised context_embedder.weight: [32, 40] in the checkpoint, [32, 24] in the model" in notes
    assert "model.vae: random initial weights" in "\n".join(tokenizer(False).notes)
