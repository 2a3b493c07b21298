"""What LoRA trains: adapters on what was loaded, whole what starts at random, nothing else; and its exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_policy import TEXTS, make_base, on_base, write_policy_recipe

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.data.loader import Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import RecipeError
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.optim.optimizer import adamw
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks import build_task
from stamo_dist.tasks.base import ExportLayout
from stamo_dist.tasks.noise import Noise
from stamo_dist.tasks.policy import PolicyTask

NEW = ("vla.projector.", "vla.state_projector.", "proprio_projector.", "action_head.", "world_head.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32 without a projector that fits, as openvla-7b is to StaMo's eyes."""
    return make_base(tmp_path_factory.mktemp("base"))


def recipe_of(folder: Path, toy_policy: Path, weights: Path, *settings: str) -> Recipe:
    path = on_base(write_policy_recipe(folder / "toy.yaml", toy_policy, actions="regression", proprio=True), weights)
    return load(path, ["policy.lora.rank=4", "train.precision=bf16", "optimizer.weight_decay=0", *settings]).recipe


def task_of(recipe: Recipe) -> tuple[PolicyTask, Mixture]:
    mixture = Mixture(recipe.data, seed=0, global_batch=8)
    task = build_task(recipe, mixture)
    assert isinstance(task, PolicyTask)
    return task, mixture


def step(task: PolicyTask, mixture: Mixture, recipe: Recipe, steps: int = 1) -> None:
    optimizer = adamw(task.trained, recipe.optimizer)
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=0)
    batch = next(iter(loader))
    for number in range(1, 1 + steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(task.trained, batch, Noise(0).at(number)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state(task: PolicyTask) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in task.trained.state_dict().items()}


def test_a_step_changes_all_that_is_new_and_nothing_that_was_loaded(
    toy_policy: Path, base: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, toy_policy, base, "policy.freeze.projector=true")
    task, mixture = task_of(recipe)
    before = state(task)
    step(task, mixture, recipe)
    after, kinds = state(task), {"whole": 0, "adapters": 0, "adapted": 0, "frozen": 0}
    loaded = {f"vla.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    for name, tensor in after.items():
        plain = name.replace(".base_layer.", ".")
        if name.startswith(NEW):
            kinds["whole"] += tensor.numel()
            assert tensor.dtype == torch.float32, name
            assert not torch.equal(tensor, before[name]), f"{name} was drawn at random and never trained"
        elif ".lora_" in name:
            kinds["adapters"] += tensor.numel()
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, before[name]) == (".lora_A." in name), name  # B is zero: A has no gradient yet
        else:
            kinds["adapted" if ".base_layer." in name else "frozen"] += tensor.numel()
            assert torch.equal(tensor, loaded[plain].bfloat16()), f"{name} is not the base's"
            assert tensor.dtype == torch.bfloat16, name
    said = "\n".join(task.notes)
    layers = 2 * (4 * 16 * 16 + 3 * 16 * 40)
    assert kinds["adapted"] == layers
    assert f"whole: {kinds['whole']:,} parameters (" in said
    assert f"adapted: {layers:,} parameters by {kinds['adapters']:,} of adapters (vla.language_model" in said
    assert f"frozen: {kinds['frozen']:,} parameters (vla.language_model {kinds['frozen']:,})" in said
    assert f"vla.state_projector {sum(t.numel() for n, t in after.items() if n.startswith(NEW[1])):,}" in said


def moment(policy: Policy) -> np.ndarray:
    frame = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    return policy.act(frame, TEXTS[0], proprio=np.array([3.0, 5.0]))


def test_adapters_come_back_trained_on_merged_and_in_peft(toy_policy: Path, base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, toy_policy, base)
    task, mixture = task_of(recipe)
    step(task, mixture, recipe, steps=3)
    trained, requires = state(task), {n for n, p in task.trained.named_parameters() if p.requires_grad}
    folder, whole = tmp_path / "adapter", tmp_path / "whole"
    task.export(folder, trained, [], ExportLayout("peft"))
    parts = {"adapter_model", "action_head", "proprio_projector", "world_head"}
    assert {p.stem for p in folder.iterdir() if p.suffix in (".safetensors", ".pt")} == parts

    eyes = {"tokenizer": toy_policy / "tokenizer"}
    alone = Policy.from_pretrained(folder, **eyes)
    task.export(whole, trained, [], ExportLayout("hf"))
    merged = Policy.from_pretrained(whole, **eyes)
    assert np.abs(moment(alone) - moment(merged)).max() < 1e-6
    unadapted = Policy.from_pretrained(_without_b(folder, tmp_path / "b"), **eyes)
    assert np.abs(moment(alone) - moment(unadapted)).max() > 1e-3

    go_on, _ = task_of(recipe_of(tmp_path / "on", toy_policy, folder))
    for name, tensor in state(go_on).items():
        assert torch.equal(tensor, trained[name]), name
    assert "14 layers, of which 14 train on and 0 are merged" in "\n".join(go_on.notes)
    assert {n for n, p in go_on.trained.named_parameters() if p.requires_grad} == requires

    other, _ = task_of(recipe_of(tmp_path / "other", toy_policy, folder, "policy.lora.rank=2"))
    name = "vla.language_model.model.layers.0.self_attn.q_proj"
    wanted = merged.network.state_dict()[f"{name}.weight"]
    assert torch.equal(state(other)[f"{name}.base_layer.weight"], wanted.bfloat16())
    assert "of which 0 train on and 14 are merged" in "\n".join(other.notes)
    with pytest.raises(RecipeError, match="--format peft: the run began by merging the adapter"):
        other.export(tmp_path / "no", state(other), [], ExportLayout("peft"))


def _without_b(folder: Path, copy: Path) -> Path:
    from safetensors.torch import save_file

    shutil.copytree(folder, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({k: 0 * t if ".lora_B." in k else t for k, t in tensors.items()}, copy / "adapter_model.safetensors")
    return copy


def test_peft_reads_what_is_exported(toy_policy: Path, base: Path, tmp_path: Path) -> None:
    """Its own loader, on the network whose names are the base's, gives the merged weights."""
    from peft import PeftModel

    recipe = recipe_of(tmp_path, toy_policy, base, "policy.lora.alpha=8", "train.precision=fp32")
    task, mixture = task_of(recipe)
    step(task, mixture, recipe, steps=2)
    trained, folder = state(task), tmp_path / "adapter"
    task.export(folder, trained, [], ExportLayout("peft"))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["base_model_name_or_path"] == str(base)

    fresh, _ = task_of(recipe_of(tmp_path / "plain", toy_policy, base, "policy.lora=null", "train.precision=fp32"))
    found = PeftModel.from_pretrained(fresh.network.vla, folder).merge_and_unload().state_dict()
    task.export(tmp_path / "whole", trained, [], ExportLayout("hf"))
    for name, tensor in task.network.vla.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_adapters_need_weights(toy_policy: Path, tmp_path: Path) -> None:
    path = write_policy_recipe(tmp_path / "toy.yaml", toy_policy)
    with pytest.raises(RecipeError, match=r"policy.lora: adapts the weights that policy.weights names"):
        load(path, ["policy.lora.rank=4"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["policy.freeze.language=true"],
            r"policy.freeze.language: without policy.weights it would keep what was drawn",
        ),
        (["policy.action_weight=0", "policy.world=null"], r"policy.action_weight: 0, and there is no other loss"),
    ],
)
def test_what_would_train_nothing_of_use_is_refused(tmp_path: Path, toy_policy: Path, settings, says) -> None:
    with pytest.raises(RecipeError, match=says):
        load(write_policy_recipe(tmp_path / "toy.yaml", toy_policy), settings)
