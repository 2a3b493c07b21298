"""Under FSDP a checkpoint goes straight into the shards: no process ever holds the whole model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from toy import write_recipe
from toy_policy import TEXTS, write_policy_recipe
from warm import Warm

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.distributed.rank import reserve_port
from stamo_dist.export_layout import ExportLayout
from stamo_dist.models.openvla.actions import Statistics
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.images import ImageProcessor
from stamo_dist.models.openvla.policy_network import PolicyNetwork, PolicySizes
from stamo_dist.models.openvla.save import PolicyParts, save_parts
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.recipe import policy as recipes
from stamo_dist.recipe.load import load

LLAMA = {"vocab_size": 448, "pad_token_id": 384, "num_attention_heads": 2, "num_key_value_heads": 2}
PROGRAM = Path(__file__).with_name("loading_peak.py")
SMALL = {**LLAMA, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
LARGE = {**LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 9}


def checkpoint(folder: Path, text_config: dict, patch_dim: int = 32) -> Path:
    """A released folder's layout, with random weights and no towers; patches of 32 numbers are the toy's."""
    torch.manual_seed(3)
    raw = {**OPENVLA_7B, "pad_token_id": 384, "text_config": {"model_type": "llama", **text_config}}
    config = OpenVLAConfig.from_dict(raw, "test").with_vision("stamo")
    network = PolicyNetwork(
        config, recipes.OpenVLAPolicyConfig(vision="stamo"), PolicySizes(3, patch_dim=patch_dim, state_dim=32)
    )
    text = TextTokenizer.from_instructions(TEXTS, size=384)
    parts = PolicyParts(network, text, ImageProcessor.from_config(config), Statistics({}, "test"))
    save_parts(folder, parts, network.state_dict(), ExportLayout(shard_size="50MB"))
    return folder


def write(path: Path, root: Path, weights: Path, name: str = "fsdp") -> Path:
    """The toy policy's recipe, starting from `weights`."""
    recipe = write_policy_recipe(path, root, strategy=name)
    text = re.sub(r"  config:\n(    .*\n)+", "", recipe.read_text())
    recipe.write_text(text.replace("policy:\n", f"policy:\n  weights: {weights}\n"))
    return recipe


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [False, True])
def test_the_losses_are_those_of_whole_copies_and_of_a_resumed_run(toy_policy, ranks, tmp_path, lora) -> None:
    """With adapters beside a projector that starts at random, and a base in bf16 where the run is."""
    weights = checkpoint(tmp_path / "weights", SMALL, patch_dim=16 if lora else 32)
    settings = ["--set", "train.steps=4", "--set", "train.checkpoint.every=2"]
    settings += ["--set", "policy.lora.rank=4"] if lora else []
    found = {}
    precise = [("ddp", 1, "fp32"), ("fsdp", 2, "fp32"), ("fsdp", 2, "bf16")]
    mixed = [("ddp", 1, "bf16"), ("zero3", 2, "bf16"), ("fsdp", 2, "bf16")]
    for name, processes, precision in mixed if lora else precise:
        folder = tmp_path / f"{name}_{precision}"
        recipe = write(folder / "toy.yaml", toy_policy, weights, name)
        ranks(processes, "train", recipe, *settings, "--set", f"train.precision={precision}")
        found[f"{name}_{precision}"] = [line["loss"] for line in lines(folder / "run")]
    for name, losses in found.items():
        assert losses == pytest.approx(next(iter(found.values())), rel=1e-4 if name == "fsdp_fp32" else 2e-2), name

    last = "fsdp_bf16" if lora else "fsdp_fp32"
    run = tmp_path / last / "run"
    again = ["--set", f"train.precision={last[-4:]}"]
    before, model = lines(run), (run / "model/model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints/step_00000004")
    assert "after step 2" in ranks(2, "train", tmp_path / last / "toy.yaml", *settings, *again)[1]
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in before]
    assert (run / "model/model.safetensors").read_bytes() == model


def test_a_tokenizer_s_decoder_too(toy, ranks, tmp_path) -> None:
    first = write_recipe(tmp_path / "first/toy.yaml", toy.shards, toy.vae)
    ranks(1, "train", first, "--set", "train.steps=2")
    found = {}
    for name, processes in (("ddp", 1), ("fsdp", 2)):
        recipe = write_recipe(tmp_path / name / "toy.yaml", toy.shards, toy.vae, strategy=name)
        weights = f"model.decoder.weights={load(first).recipe.run_dir}/model/transformer"
        ranks(processes, "train", recipe, "--set", weights, "--set", "train.steps=3")
        found[name] = [line["loss"] for line in lines(Path(load(recipe).recipe.run_dir))]
    assert found["fsdp"] == pytest.approx(found["ddp"], rel=1e-4)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_no_process_holds_the_whole_model(toy_policy: Path, tmp_path: Path, warm: Warm, strategy: str) -> None:
    weights = checkpoint(tmp_path / "weights", LARGE)
    recipe = write(tmp_path / "toy.yaml", toy_policy, weights)
    found = {}
    for meta_init in (True, False):
        port = reserve_port()
        ranks = [warm.start(rank, port, recipe, strategy, meta_init, program=PROGRAM) for rank in range(2)]
        codes = [rank.wait(120) for rank in ranks]
        said = [rank.stdout.read_text() for rank in ranks]
        assert codes == [0, 0], "\n".join(said)
        found[meta_init] = [json.loads(text.splitlines()[-1]) for text in said]
    total = found[True][0][2]
    assert total > 200e6
    largest = 768 * 2048 * 4
    for (peak, elements, _), (most, whole, _) in zip(found[True], found[False], strict=True):
        assert peak < total / 2 + 4 * largest + 30e6, f"{peak / 1e6:.0f} MB of {total / 1e6:.0f}"
        assert most > 0.95 * total, "the measurement sees a whole copy"
        assert elements == whole
