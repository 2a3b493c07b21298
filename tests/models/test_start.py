"""What a tokenizer without pretrained weights needs to begin to learn."""

from __future__ import annotations

import pytest
import torch

from stamo_dist.errors import RecipeError
from stamo_dist.models.compressor import Compressor
from stamo_dist.models.decoder import Decoder
from stamo_dist.optim.optimizer import adamw
from stamo_dist.recipe import schema


def test_standardised_states_differ_between_frames_that_look_alike():
    torch.manual_seed(0)
    compressor = Compressor(schema.CompressorConfig(tokens=2, dim=32, width=32, depth=1, heads=2), 16)
    features = torch.randn(1, 9, 16) + 0.05 * torch.randn(64, 9, 16)
    before = compressor(features).std(0).mean()
    compressor.standardise(features)
    after = compressor(features)
    assert before < 0.2
    assert after.std(0).mean() > 0.8
    assert "state_mean" in compressor.state_dict()


def test_whitened_states_show_what_happens_within_each_of_two_scenes():
    torch.manual_seed(0)
    scenes = torch.randn(2, 1, 9, 16).expand(-1, 200, -1, -1) + 0.02 * torch.randn(2, 200, 9, 16)
    within = {}
    for whiten in (False, True):
        torch.manual_seed(1)
        cfg = schema.CompressorConfig(tokens=2, dim=8, width=32, depth=1, heads=2, standardise=400, whiten=whiten)
        compressor = Compressor(cfg, 16)
        compressor.standardise(scenes.flatten(0, 1))
        within[whiten] = torch.stack([compressor(scene).std(0).mean() for scene in scenes])
    assert (within[False] < 0.4).all()
    assert (within[True] > 0.6).all()
    assert "state_map" in compressor.state_dict()


def test_preconditioned_decoder_starts_at_the_best_linear_guess():
    """With a zero last layer the velocity is the linear part alone; at σ = 1 that is z, at σ = ½ nothing."""
    compressor = schema.CompressorConfig(tokens=2, dim=32, width=32, depth=1, heads=2)
    config = {"patch_size": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    decoder = Decoder.from_config(schema.DecoderConfig(config=config, precondition=True), compressor, (4, 4, 4))
    z, tokens = torch.randn(3, 4, 4, 4), torch.randn(3, 2, 32)
    velocity = decoder(z, torch.tensor([1.0, 0.5, 0.0]), tokens)
    assert torch.allclose(velocity[0], z[0], atol=1e-6)
    assert torch.allclose(velocity[1], torch.zeros_like(z[1]), atol=1e-6)
    assert torch.allclose(velocity[2], -z[2], atol=1e-6)

    z0, noise = torch.randn(20_000), torch.randn(20_000)
    mixed = 0.3 * z0 + 0.7 * noise  # σ = 0.7
    slope = ((noise - z0) * mixed).mean() / mixed.square().mean()
    assert abs(slope - (2 * 0.7 - 1) / (0.3**2 + 0.7**2)) < 0.05


def test_the_encoder_learns_at_its_own_rate():
    module = torch.nn.ModuleDict({"compressor": torch.nn.Linear(2, 2), "decoder": torch.nn.Linear(2, 2)})
    groups = adamw(module, schema.Optimizer(encoder_lr=0.1, encoder_start=5)).param_groups
    assert {(g["scale"], g["start"], g["weight_decay"]) for g in groups} == {
        (0.1, 5, 0.01), (0.1, 5, 0.0), (1.0, 0, 0.01), (1.0, 0, 0.0),
    }  # fmt: skip


def test_parts_of_a_policy_learn_at_rates_of_their_own():
    module = torch.nn.ModuleDict({
        "vla": torch.nn.ModuleDict({"projector": torch.nn.Linear(2, 2), "language_model": torch.nn.Linear(2, 2)}),
        "world_head": torch.nn.Linear(2, 2, bias=False),
    })  # fmt: skip
    cfg = schema.Optimizer(lr_scale={"vla": 0.5, "vla.projector": 2, "world_head": 10})
    rates = {id(p): g["scale"] for g in adamw(module, cfg).param_groups for p in g["params"]}
    expected = {"vla.projector": 2, "vla.language_model": 0.5, "world_head": 10}
    assert {n.rpartition(".")[0]: rates[id(p)] for n, p in module.named_parameters()} == expected
    module["world_head"].requires_grad_(False)
    with pytest.raises(RecipeError, match=r"lr_scale.world_head: no trained parameter's name begins so; .* vla.lang"):
        adamw(module, cfg)
