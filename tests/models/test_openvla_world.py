"""World modelling and co-training in the network, and a StaMo state encoder, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vla_cases import INSTRUCTIONS, TINY, close, text_tokenizer

from stamo_dist.errors import CheckpointError, DataError, RecipeError
from stamo_dist.models.openvla.actions import ActionTokenizer, Statistics
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.images import ImageProcessor
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.openvla.policy_network import Inputs, PolicyNetwork, PolicySizes
from stamo_dist.models.openvla.save import save_pretrained
from stamo_dist.models.openvla.stamo import StamoVision
from stamo_dist.models.policies import load_policy
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe import policy as recipe

STATISTICS = {"toy": {"action": {"q01": [-1.0, 0.0], "q99": [1.0, 4.0]}}}


def build(cfg: recipe.PolicyConfig, sizes: PolicySizes) -> PolicyNetwork:
    torch.manual_seed(0)
    return PolicyNetwork(OpenVLAConfig.from_dict({**OPENVLA_7B, **TINY}, "test").with_vision(cfg.vision), cfg, sizes)


def batch(network: PolicyNetwork, images: Any) -> Inputs:
    """Three samples: with actions and target, without actions, without target."""
    rng = np.random.default_rng(0)
    sizes = network.sizes
    actions = rng.uniform(-1, 1, (3, sizes.chunk, sizes.action_dim))
    ids = ActionTokenizer(512).encode(actions)
    text = text_tokenizer().encode(
        INSTRUCTIONS, [ids[0], None, ids[2]], blanks=sizes.action_tokens if network.parallel else 0
    )
    actions[1] = np.nan
    target = torch.randn(3, 2, 8)
    target[2] = torch.nan
    return Inputs(
        text.input_ids, text.attention_mask, text.prompts, images, text.labels,
        actions=torch.from_numpy(actions).float(), has_actions=torch.tensor([True, False, True]),
        target=target, has_target=torch.tensor([True, True, False]),
    )  # fmt: skip


@pytest.mark.parametrize("read", ["prompt", "actions"])
@pytest.mark.parametrize("actions", ["tokens", "parallel_tokens", "regression"])
def test_each_sample_counts_where_it_has_something(actions: Any, read: Any) -> None:
    cfg = recipe.OpenVLAPolicyConfig(actions=actions, world=recipe.WorldModel(read=read, width=16))
    network = build(cfg, PolicySizes(2, 3, 0, (2, 8)))
    given = batch(network, torch.randn(3, 6, 28, 28))
    losses = network(given)
    tokens = 7 if actions != "regression" else 1
    assert losses.action_count.tolist() == [tokens, 0, tokens]
    assert losses.target_count.tolist() == [1, 1, 0]
    assert (losses.action > 0).tolist() == [True, False, True]
    assert (losses.mse > 0).tolist() == (losses.l1 > 0).tolist() == [True, True, False]
    assert losses.mse[0] != losses.l1[0]

    # A sample without actions teaches the action part nothing, one without a target the world head nothing.
    losses.action[1].backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())
    losses.mse[2].backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())
    (losses.action.sum() + losses.mse.sum() + losses.l1.sum()).backward()
    for name, p in network.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name


def test_the_head_learns_what_the_backbone_sees() -> None:
    cfg = recipe.OpenVLAPolicyConfig(actions="regression", world=recipe.WorldModel(width=32))
    network = build(cfg, PolicySizes(2, 3, 0, (2, 8)))
    given = batch(network, torch.randn(3, 6, 28, 28))
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 3e-3)
    history = []
    for _ in range(60):
        losses = network(given)
        total = losses.action.sum() + losses.mse.sum() + losses.l1.sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.3 * history[0]


def test_gradient_checkpointing_changes_nothing() -> None:
    cfg = recipe.OpenVLAPolicyConfig(actions="regression", film=True)
    network = build(cfg, PolicySizes(2, 3)).train()
    given = batch(network, torch.randn(3, 6, 28, 28))
    grads = []
    for every in (0, 1, 2):
        network.set_gradient_checkpointing(every)
        network.zero_grad()
        network(given).action.sum().backward()
        grads.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len({*map(len, grads)}) == 1
    for before, *recomputed in zip(*grads, strict=True):
        for after in recomputed:
            close(after, before, 1e-5)


@pytest.fixture
def exported(tokenizer: Callable[..., Tokenizer], tmp_path: Path) -> Path:
    tokenizer(weights=False).save_pretrained(tmp_path / "stamo")
    return tmp_path / "stamo"


@pytest.mark.parametrize("reads", ["patches", "states", "both"])
def test_stamo_s_eyes(tokenizer: Callable[..., Tokenizer], exported: Path, tmp_path: Path, reads: Any) -> None:
    encoder = StamoVision(StateEncoder.from_pretrained(exported))
    cfg = recipe.OpenVLAPolicyConfig(
        vision="stamo", stamo=reads, views=2, tokenizer=str(exported), world=recipe.WorldModel(width=16)
    )
    sizes = PolicySizes(
        2, 1, 0, encoder.target_shape("motion"),
        encoder.patch_dim if reads != "states" else None, encoder.state_shape[1] if reads != "patches" else None,
    )  # fmt: skip
    network = build(cfg, sizes).eval()
    frames = torch.randint(0, 256, (3, 2, 32, 32, 3), dtype=torch.uint8)
    seen = encoder.read(frames, reads)
    patches = encoder.target_shape("dinov2")[0]
    tokens = 2 * {"patches": patches, "states": 2, "both": patches + 2}[reads]
    assert network.vla.image_tokens(seen).shape == (3, tokens, 16)
    assert not any(name.startswith("vla.vision_backbone") for name in network.state_dict())

    config = network.vla.config
    policy = Policy(network, text_tokenizer(), ImageProcessor.from_config(config), Statistics(STATISTICS, "x"), encoder)
    save_pretrained(policy, tmp_path / "policy")
    again = Policy.from_pretrained(tmp_path / "policy")
    views = list(frames[0].numpy())
    acted = policy.act(views, INSTRUCTIONS[0])
    assert np.array_equal(again.act(views, INSTRUCTIONS[0]), acted)
    # It sees through half of the tokenizer: the rest is neither held nor read.
    for part in ("transformer", "vae"):
        (exported / part / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    half = load_policy(tmp_path / "policy")
    assert np.array_equal(half.act(views, INSTRUCTIONS[0]), acted)
    assert half.vision is not None
    held = {name.partition(".")[0] for name, _ in half.vision.tokenizer.named_parameters()}
    assert held == {"encoder", "compressor"}
    with pytest.raises(DataError, match="looks at 2 views of a moment, not 1"):
        again.act(views[0], INSTRUCTIONS[0])
    other = tokenizer(weights=False)
    torch.nn.init.zeros_(other.trained.compressor.queries)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"is not the StaMo tokenizer that .* was trained with"):
        Policy.from_pretrained(tmp_path / "policy", tokenizer=tmp_path / "other")


def test_targets_of_the_world_head(exported: Path) -> None:
    stamo = Tokenizer.from_pretrained(exported)
    encoder = StamoVision(StateEncoder.from_pretrained(exported))
    now, then = torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8)
    close(encoder.target(now, then, "state"), stamo.encode(then), 1e-6)
    close(encoder.target(now, then, "motion"), stamo.encode(then) - stamo.encode(now), 1e-6)
    close(encoder.target(now, then, "dinov2"), stamo.encoder(then), 1e-6)
    close(
        encoder.encode(then).target(encoder.encode(now), "motion"),
        stamo.encode(then) - stamo.encode(now),
        1e-6,
    )
    for target in ("state", "motion", "dinov2"):
        assert encoder.target(now, then, target).shape[1:] == encoder.target_shape(target)  # type: ignore[arg-type]
        assert not encoder.target(now, then, target).requires_grad  # type: ignore[arg-type]


def test_parts_that_do_not_fit_are_named() -> None:
    for cfg, sizes, message in [
        (
            recipe.OpenVLAPolicyConfig(proprio=True),
            PolicySizes(2),
            "policy.proprio: the sources have no proprioception",
        ),
        (recipe.OpenVLAPolicyConfig(world=recipe.WorldModel()), PolicySizes(2), "policy.world: there is no tokenizer"),
        (recipe.OpenVLAPolicyConfig(vision="stamo"), PolicySizes(2), "policy.vision: stamo needs the StaMo tokenizer"),
    ]:
        with pytest.raises(RecipeError, match=message):
            build(cfg, sizes)
    with pytest.raises(ValueError, match="film: the frozen StaMo encoder has no FiLM"):
        recipe.OpenVLAPolicyConfig(vision="stamo", film=True)
    with pytest.raises(ValueError, match="leave no loss"):
        recipe.WorldModel(mse=0, l1=0)
