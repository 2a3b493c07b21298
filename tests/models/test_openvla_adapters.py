"""Adapters in PEFT's format on a policy: read to the bit, never ignored, and what trains beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from vla_cases import TINY, text_tokenizer

from stamo_dist.errors import CheckpointError
from stamo_dist.models.openvla import adapt, load
from stamo_dist.models.openvla.actions import Statistics
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.images import ImageProcessor
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.openvla.policy_network import PolicyNetwork, PolicySizes
from stamo_dist.models.openvla.save import PolicyParts, save_parts
from stamo_dist.plan.registry import config_of
from stamo_dist.pretrained.wanted import adapter_base, look_at
from stamo_dist.recipe import policy as recipe
from stamo_dist.recipe import schema

COLUMN: dict[str, Any] = {"q01": [-1.0, 0.0], "q99": [1.0, 4.0], "min": [-2.0, 0.0], "max": [2.0, 5.0]}
LINEAR, CONV = "language_model.model.layers.0.self_attn.q_proj", "vision_backbone.featurizer.patch_embed.proj"
ODD = "language_model.lm_head"
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": "all-linear", "bias": "none"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = OpenVLAConfig.from_dict({**OPENVLA_7B, **TINY}, "test")
    network = PolicyNetwork(config, recipe.OpenVLAPolicyConfig(), PolicySizes(2))
    statistics = Statistics({"toy": {"action": {**COLUMN, "mask": [True, False]}}}, "test")
    folder = tmp_path / "base"
    processor = ImageProcessor.from_config(config)
    save_parts(folder, PolicyParts(network, text_tokenizer(), processor, statistics), network.state_dict())
    (folder / "policy.json").unlink()  # as a released checkpoint is
    return folder


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return Policy.from_pretrained(folder).network.vla.state_dict()


def adapter(folder: Path, before: dict[str, torch.Tensor], **config: Any) -> dict[str, torch.Tensor]:
    """Write an adapter by hand, as PEFT names it; returns its tensors."""
    torch.manual_seed(1)
    tensors = {"base_model.model.projector.fc1.bias": torch.randn_like(before["projector.fc1.bias"])}
    for layer in (LINEAR, CONV, ODD):
        out, *inputs = before[f"{layer}.weight"].shape
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(3, *inputs)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(out, 3, *(1 for _ in inputs[1:]))
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "modules_to_save": ["projector.fc1"], **config}))
    return tensors


def check(found: dict[str, torch.Tensor], before: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        wanted = parts.get(f"base_model.model.{name}", before[name])
        if f"{key}A.weight" in parts:
            down, up = parts[f"{key}A.weight"], parts[f"{key}B.weight"]
            scale = 12 / 3 if name.startswith(ODD) else 6 / 3
            wanted = before[name] + ((up.flatten(1) @ down.flatten(1)) * scale).view_as(before[name])
        assert torch.equal(tensor, wanted), name


def test_an_adapter_made_by_hand_is_added_to_the_bit(base: Path, tmp_path: Path) -> None:
    """Named by a path, by one from the adapter's folder, lying under its base, in OFT's subfolder, beside the base."""
    before, pattern = weights(base), {"alpha_pattern": {"lm_head": 12}}
    parts = adapter(tmp_path / "named", before, base_model_name_or_path=str(base), **pattern)
    check(weights(tmp_path / "named"), before, parts)
    adapter(tmp_path / "relative", before, base_model_name_or_path="../base", **pattern)
    check(weights(tmp_path / "relative"), before, parts)
    (tmp_path / "oft").mkdir()
    adapter(tmp_path / "oft/lora_adapter", before, base_model_name_or_path=str(base), **pattern)
    check(weights(tmp_path / "oft"), before, parts)
    adapter(base / "inside", before, base_model_name_or_path="gone/away", **pattern)
    check(weights(base / "inside"), before, parts)
    (note,) = load.locate(str(base / "inside")).notes()
    assert note.endswith(f"names gone/away, which is not to be had: {base} is its base")
    adapter(base / "lora_adapter", before, **pattern)
    check(weights(base), before, {})  # OFT's, which is merged into what lies above it
    assert "lora_adapter is not read" in load.locate(str(base)).notes()[0]
    adapter(base, before, base_model_name_or_path="gone/away", **pattern)
    check(weights(base), before, parts)
    with pytest.raises(CheckpointError, match="is the base of an adapter and has one itself"):
        load.locate(str(tmp_path / "named"))
    assert adapter_base(str(tmp_path / "oft")) == str(base), "OFT's, which nothing was merged with"


def test_an_adapter_and_its_base_come_from_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT publishes them: no config.json beside the adapter."""
    cache, commits = tmp_path / "hub", {"base": "a" * 40, "lora": "b" * 40}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = weights(base)
    for name, commit in commits.items():
        (cache / f"models--org--{name}" / "refs").mkdir(parents=True)
        (cache / f"models--org--{name}" / "refs/main").write_text(commit)
    lora = cache / "models--org--lora/snapshots" / commits["lora"]
    lora.mkdir(parents=True)
    parts = adapter(lora, before, base_model_name_or_path="org/base", revision="main", alpha_pattern={"lm_head": 12})
    given = schema.Recipe.model_validate(
        {"stage": "policy", "data": {"sources": {"a": {"path": "a"}}, "horizon": 1}, "policy": {"weights": "org/lora"},
         "train": {"steps": 1}}
    )  # fmt: skip
    environ = {"HF_HUB_CACHE": str(cache)}
    assert look_at(given, environ).absent == {
        "policy.weights (base of org/lora)": ("org/base@main", "hf download org/base --revision main")
    }
    with pytest.raises(CheckpointError, match="its base 'org/base@main' is no folder with weights and not to be had"):
        load.locate("org/lora")
    shutil.copytree(base, cache / "models--org--base/snapshots" / commits["base"])
    inner = base / "inner"  # another policy one folder up is not what it names
    adapter(inner, before, base_model_name_or_path="org/base")
    assert load.locate(str(inner)).base == cache / "models--org--base/snapshots" / commits["base"]
    assert adapter_base(str(inner), environ) == "org/base"
    check(weights("org/lora"), before, parts)
    assert load.locate("org/lora").sources() == {
        "policy.weights": f"org/lora@{commits['lora']}", "policy.weights (base)": f"org/base@{commits['base']}",
    }  # fmt: skip
    assert not look_at(given, environ).absent
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert (
        config_of("policy", "org/lora", "policy.weights")["text_config"]["vocab_size"]
        == TINY["text_config"]["vocab_size"]
    )


def test_what_is_no_whole_plain_adapter_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, folder = weights(base), tmp_path / "adapter"

    def refused(match: str, place: Path = folder) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            Policy.from_pretrained(place)
        assert "\n" not in str(caught.value) or "does not fit the policy" in str(caught.value)

    named = {"base_model_name_or_path": str(base)}
    adapter(folder, before, **named, use_dora=True)
    refused("adapter_config.json says use_dora, and only plain LoRA is read; merge it")
    adapter(folder, before, **named, peft_type="LOHA")
    refused("says peft_type LOHA, and only LORA is read")
    adapter(folder, before, base_model_name_or_path="nobody/nothing")
    refused("is an adapter, and its base 'nobody/nothing' is no folder with weights")
    monkeypatch.chdir(base)  # where we are is no base
    adapter(folder, before)
    refused("is an adapter that names no base; set base_model_name_or_path")
    tensors = adapter(folder, before, **named)
    changes = {
        "no fitting lora_A and lora_B": {f"base_model.model.{LINEAR}.lora_B.weight": None},
        r"unknown to the model: vla.language_model.nowhere.weight": {
            "base_model.model.language_model.nowhere.lora_A.weight": torch.zeros(3, 4),
            "base_model.model.language_model.nowhere.lora_B.weight": torch.zeros(4, 3),
        },
        r"has another shape: vla.language_model": {f"base_model.model.{LINEAR}.lora_A.weight": torch.zeros(3, 5)},
        "which is no plain LoRA": {"base_model.model.x.lora_embedding_A": torch.zeros(3, 4)},
    }
    for match, change in changes.items():
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, folder / "adapter_model.safetensors")
        refused(match)

    shutil.copy(folder / "adapter_model.safetensors", base)
    refused("adapter_model.safetensors has no adapter_config.json beside it", base)
    (base / "adapter_model.safetensors").rename(base / "adapter_model.bin")
    shutil.copy(folder / "adapter_config.json", base)
    refused(r"no adapter_model.safetensors \(adapter_model.bin is not read", base)


def test_film_starts_at_nothing_and_trains_beside_adapters() -> None:
    cfg = recipe.OpenVLAPolicyConfig.model_validate({"film": True, "actions": "regression", "lora": {"rank": 2}})
    config = OpenVLAConfig.from_dict({**OPENVLA_7B, **TINY}, "test")
    plain = PolicyNetwork(config, cfg.model_copy(update={"film": False}), PolicySizes(2, 3)).state_dict()
    network = PolicyNetwork(config, cfg, PolicySizes(2, 3))
    found = {
        re.sub(r"(featurizer\.blocks\.\d+\.)", r"\1block.", name): load.StoredTensor.in_memory(tensor)
        for name, tensor in plain.items()
    }
    filling = load.WeightLoader(network, found, "here", fresh=load.fresh_parts(cfg))
    adapt.prepare(network, cfg.model_copy(update={"freeze": recipe.Freeze(vision=True)}), filling.whole)
    trained = {n for n, p in network.named_parameters() if p.requires_grad and n.startswith("vla.vision_backbone.")}
    assert {n.rsplit(".", 2)[1] for n in trained} == {"scale", "shift"}
    assert "vla.vision_backbone.featurizer.blocks.0.shift.bias" in trained
    assert re.search(r"whole: [\d,]+ parameters \(FiLM [\d,]+, action_head", adapt.listing(network)[0])
