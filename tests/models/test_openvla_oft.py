"""OpenVLA-OFT: parallel decoding, regression and discrete actions, proprioception, FiLM."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vla_cases import Golden, close, goldens, text_tokenizer

from stamo_dist.models.openvla import load, save
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.heads import ActionHead
from stamo_dist.models.openvla.network import OpenVLA
from stamo_dist.models.openvla.policy import Policy, Unsaid
from stamo_dist.models.openvla.policy_network import Inputs, PolicyNetwork, PolicySizes
from stamo_dist.recipe import policy as recipe


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("oft/libero_dev")


def policy(golden: Golden, **options: Any) -> Policy:
    unsaid = Unsaid(options, tower_options=golden.towers)
    return Policy.from_pretrained(golden.folder, unsaid=unsaid, text=text_tokenizer(), dtype=torch.float32)


@pytest.mark.parametrize("actions", ["regression", "parallel_tokens"])
def test_chunks(golden: Golden, actions: str) -> None:
    oft = policy(golden, actions=actions)
    assert (oft.cfg.views, oft.cfg.proprio, oft.network.sizes) == (2, True, PolicySizes(7, 8, 8))
    for i, case in enumerate(golden.about["predict"]):
        found, _ = oft.predict_encoded(
            golden.prompt(f"predict{i}", blanks=56),
            golden.inputs[f"predict{i}.pixel_values"],
            unnorm_key=case["unnorm_key"],
            proprio=golden.inputs[f"predict{i}.proprio_raw"].numpy()[None],
        )
        expected = golden.expected[f"predict{i}.{'actions' if actions == 'regression' else 'discrete_actions'}"]
        close(found[0], expected, 1e-5)


def batch(golden: Golden) -> Inputs:
    given = golden.inputs
    labels = given["train.labels"]
    return Inputs(
        given["train.input_ids"],
        given["train.attention_mask"],
        (labels != -100).int().argmax(1),
        given["train.pixel_values"],
        labels,
        given["train.proprio"],
        given["train.actions"],
    )


def test_training_losses(golden: Golden) -> None:
    given = batch(golden)
    losses = policy(golden).network(given)
    close(losses.action.mean(), golden.expected["train.l1_loss"].squeeze(), 1e-5)
    losses = policy(golden, actions="parallel_tokens").network(given)
    close(losses.action.sum() / losses.action_count.sum(), golden.expected["train.token_loss"].squeeze(), 1e-5)


def test_hidden_states_and_head(golden: Golden) -> None:
    network, given = policy(golden).network, batch(golden)
    with torch.no_grad():
        sequence = network._sequence(given)
        close(sequence.embeddings, golden.expected["train.embeddings"])
        hidden, valid = network.vla.hidden(sequence, bidirectional=True), golden.expected["train.valid"]
        close(hidden[valid], golden.expected["train.last_hidden_state"][valid])
        assert network.action_head is not None
        close(network.action_head(golden.inputs["head.hidden"]), golden.expected["head.actions"], 1e-5)
        # A sample without actions leaves the loss alone, whatever stands in its place.
        nothing = given.actions * torch.tensor([1.0, torch.nan])[:, None, None]
        half = network(given._replace(actions=nothing, has_actions=torch.tensor([True, False])))
        close(half.action, network(given).action * torch.tensor([1, 0]))
        assert half.action_count.tolist() == [1, 0]


def test_names_at_full_size() -> None:
    extra = json.loads(goldens("keys/openvla_oft_extra_state_dicts.json").read_text())
    with torch.device("meta"):
        vla = OpenVLAConfig.from_dict(OPENVLA_7B, "test")
        head = ActionHead(vla.hidden, 7)
    shapes = {k: list(v.shape) for k, v in head.state_dict().items()}
    assert shapes == extra["action_head--*_checkpoint.pt (L1)"]


FILM: dict[str, Any] = {
    **OPENVLA_7B,
    "image_sizes": [28, 28],
    "timm_kwargs": [{"embed_dim": 24, "depth": 3, "num_heads": 2}, {"embed_dim": 32, "depth": 3, "num_heads": 2}],
    "text_config": {
        "model_type": "llama", "vocab_size": 576, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
}  # fmt: skip


def test_film_has_the_released_names_and_scales_tokens() -> None:
    extra = json.loads(goldens("keys/openvla_oft_extra_state_dicts.json").read_text())
    released = {
        k.replace(".base_layer", ""): v
        for k, v in extra["vision_backbone--*_checkpoint.pt (FiLM + LoRA, TINY towers of 3 blocks)"].items()
        if "lora_" not in k
    }
    torch.manual_seed(0)
    config = OpenVLAConfig.from_dict(FILM, "test")
    vla = OpenVLA(config, film=True).eval()
    assert {f"vision_backbone.{k}": list(v.shape) for k, v in vla.vision_backbone.state_dict().items()} == released

    # Written out by hand: every block but the last, on all tokens, between its two halves.
    plain = copy.deepcopy(vla.vision_backbone.featurizer)
    language, pixels = torch.randn(2, 16), torch.randn(2, 3, 28, 28)
    for block in plain.blocks:
        nn.init.normal_(block.scale.weight, std=0.1)
        nn.init.normal_(block.shift.weight, std=0.1)
    x = plain._pos_embed(plain.patch_embed(pixels))
    for film in plain.blocks[:2]:
        block = film.block
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x * (1 + film.scale(language).view(2, 1, -1)) + film.shift(language).view(2, 1, -1)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    close(vla.vision_backbone.patch_features(plain, pixels, language), x[:, 5:], 1e-5)


def test_film_reads_all_that_is_no_action() -> None:
    torch.manual_seed(0)
    config = OpenVLAConfig.from_dict(FILM, "test")
    cfg = recipe.OpenVLAPolicyConfig(film=True, actions="regression")
    network = PolicyNetwork(config, cfg, PolicySizes(action_dim=2, chunk=2)).eval()
    seen: list[torch.Tensor] = []
    network.vla.vision_backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    ids = torch.tensor([[1, 5, 6, 1, 1, 1, 1, 2], [1, 5, 1, 1, 1, 1, 2, 512]])
    network(Inputs(ids, ids != 512, torch.tensor([3, 2]), torch.randn(2, 6, 28, 28)))
    table = network.vla.language_model.get_input_embeddings().weight
    close(seen[0], torch.stack([table[[1, 5, 6, 2]].mean(0), table[[1, 5, 2, 512]].mean(0)]), 1e-6)


def test_a_released_film_folder_loads(tmp_path: Path) -> None:
    """Adapters inside the towers' file are merged, and `module.` prefixes taken off."""
    torch.manual_seed(0)
    config = OpenVLAConfig.from_dict(FILM, "test")
    network = PolicyNetwork(config, recipe.OpenVLAPolicyConfig(film=True), PolicySizes(2))
    tower_state = network.vla.vision_backbone.state_dict()
    file = {f"module.{k}": v for k, v in save._as_adapted(network.vla.vision_backbone, tower_state).items()}
    extra = json.loads(goldens("keys/openvla_oft_extra_state_dicts.json").read_text())
    released = extra["vision_backbone--*_checkpoint.pt (FiLM + LoRA, TINY towers of 3 blocks)"]
    assert file.keys() == {f"module.{key}" for key in released}
    a = "module.vision_backbone.featurizer.patch_embed.proj.lora_A.default.weight"
    b, base = a.replace("lora_A", "lora_B"), a.replace("lora_A.default", "base_layer")
    nn.init.normal_(file[a])
    nn.init.normal_(file[b])
    delta = 0.5 * torch.einsum("rchw,or->ochw", file[a], file[b][:, :, 0, 0])
    torch.save(file, tmp_path / "vision_backbone--10_checkpoint.pt")
    save_file(save._without_film(network.vla.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(FILM))
    with load.on_meta():
        loaded = PolicyNetwork(config, recipe.OpenVLAPolicyConfig(film=True), PolicySizes(2))
    load.materialise(loaded)
    load.WeightLoader(loaded, load.stored(tmp_path, loaded), "here").write(loaded)
    close(loaded.vla.vision_backbone.featurizer.patch_embed.proj.weight, file[base] + delta, 1e-5)
    assert load_file(tmp_path / "model.safetensors").keys() == OpenVLA(config).state_dict().keys()
