"""`stamo plan`: the sizes it counts, what each strategy divides, and what it says of recipes whose files are away."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import traced_memory
from safetensors.torch import load_file
from toy import write_recipe
from toy_policy import write_diffusion_recipe, write_policy_recipe
from warm import Warm

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.data.mixture import Mixture
from stamo_dist.distributed import strategies
from stamo_dist.errors import RecipeError
from stamo_dist.models.flops import shapes_only
from stamo_dist.models.openvla import shapes as policies
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.policy_network import PolicySizes
from stamo_dist.models.policies import load_policy
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.plan.activation_peak import peak
from stamo_dist.plan.memory import Memory, plan
from stamo_dist.plan.roofline import GPUS, Expected, expect
from stamo_dist.plan.serving import serving
from stamo_dist.recipe import policy as recipes
from stamo_dist.recipe.load import load
from stamo_dist.tasks import build_task
from stamo_dist.tasks.base import ExportLayout

ROOT = Path(__file__).parents[2]
STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"]
LARGER = """\
  encoder:
    image_size: 32
    train: true
    config: {patch_size: 8, hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4}
  compressor: {tokens: 2, dim: 256, width: 256, depth: 2, heads: 4}
  decoder:
    config: {patch_size: 1, num_layers: 8, num_attention_heads: 8, attention_head_dim: 64}
"""
SMALL = {"vocab_size": 448, "pad_token_id": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4}  # fmt: skip


def test_the_peak_is_that_of_the_tensors_that_live_at_once() -> None:
    """Two layers without bias: input, hidden state and output live until the backward pass; gradients do not count."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(256, 1024, bias=False), torch.nn.ReLU(), torch.nn.Linear(1024, 8))
    with shapes_only(model):
        found = peak(lambda: model(torch.empty(64, 256)).sum(), [model])
    hidden = 64 * 1024 * 4
    assert 3 * hidden < found < 3 * hidden + 1024 * 256 * 4 + 200_000  # with the gradients of both sides of the ReLU


def test_what_is_computed_forward_and_backward() -> None:
    config = OpenVLAConfig.from_dict({**OPENVLA_7B, "pad_token_id": 384, "text_config": SMALL}, "test")
    sizes, seen = PolicySizes(3, patch_dim=32), policies.TokenCounts(20, 16)
    cfg = recipes.OpenVLAPolicyConfig(vision="stamo", stamo="patches")

    def flops(**changes: object) -> int:
        network = policies.on_meta(config.with_vision("stamo"), cfg.model_copy(update=changes), sizes)
        return policies.training_flops(network, seen)

    layers = 3 * (4 * 64**2 + 3 * 64 * 96)
    tokens = 20 + 16
    attention = 3 * 4 * tokens**2 * 64
    whole = flops()
    forward = 2 * layers * tokens + attention
    # The backward pass costs twice the forward, and a half of the attention's product more, which is recomputed.
    assert 3 * forward < whole < 3.3 * forward
    frozen = flops(freeze=recipes.Freeze(language=True))
    assert 0.6 * whole < frozen < 0.8 * whole, "no gradients of weights, but those that reach the projector"


@pytest.fixture(scope="module")
def full() -> list:
    small = ["train.micro_batch=8", "train.gradient_checkpointing=true"]
    return plan(load(ROOT / "recipes/policy_openvla_state.yaml", small).recipe, 8, STRATEGIES)


def test_a_full_size_policy_needs_no_files(full: list) -> None:
    by = {memory.strategy: memory for memory in full}
    trained = by["fsdp"].trained_numel
    assert trained == pytest.approx(6_787e6, rel=1e-3)
    assert by["ddp"].optimizer == 8 * trained
    assert by["fsdp"].parameters == pytest.approx(4 * trained / 8, rel=1e-6)
    assert by["zero2"].parameters == 2 * trained
    assert by["ddp"].peak > by["zero1"].peak > by["zero2"].peak > by["zero3"].peak
    assert by["fsdp"].peak < 30e9
    assert any("tokenizer_sim_droid is not there" in note for note in by["fsdp"].notes)


def test_checkpointing_and_batch_decide_the_activations() -> None:
    path = ROOT / "recipes/tokenizer_sim_droid.yaml"

    def activations(*settings: str) -> int:
        return plan(load(path, list(settings)).recipe, 8)[0].activations

    small, large = (activations(f"train.micro_batch={n}", "train.gradient_checkpointing=false") for n in (16, 32))
    assert large == pytest.approx(2 * small, rel=0.1)
    every, second = (activations("train.micro_batch=32", f"train.gradient_checkpointing={k}") for k in ("true", "2"))
    assert every < 0.5 * large
    assert 1.3 * every < second < 0.75 * large


@pytest.fixture(scope="module")
def larger(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of 79 M parameters."""
    path = write_recipe(tmp_path_factory.mktemp("larger") / "recipe.yaml", toy.shards, toy.vae)
    path.write_text(re.sub(r"(?s)  encoder:.*?  vae:", LARGER + "  vae:", path.read_text()))
    return path


TWICE = "train.global_batch=64"
RECOMPUTED = "train.gradient_checkpointing=true"
KEPT = "strategy.reshard_after_forward=false"
WHOLE = "strategy.gradients=whole"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (STRATEGIES, []),
        (STRATEGIES, [TWICE, RECOMPUTED]),
        (["hsdp"], [TWICE, WHOLE]),
        (["fsdp"], [KEPT, RECOMPUTED]),
    ],
    ids=["", "recomputed", "whole gradients", "kept weights"],
)
def test_the_peak_is_that_of_a_traced_step(
    names: list[str], settings: list[str], larger: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one of eight processes, whose real step is traced."""
    common = ["train.precision=bf16", "train.ema=0.999", "train.micro_batch=4", "train.global_batch=32", *settings]

    def under(name: str) -> list[str]:
        return [*common, f"strategy.name={name}", *(["strategy.shard_group=4"] if name == "hsdp" else [])]

    monkeypatch.setattr(strategies, "REDUCE_BUCKET", traced_memory.BUCKET)
    planned = plan(load(larger, under(names[-1])).recipe, traced_memory.DEVICES, names)
    found = {name: traced_memory.measure(warm, larger, under(name)) for name in names}
    assert {memory.strategy: memory.peak for memory in planned} == pytest.approx(found, rel=0.1)


def test_every_size_of_the_global_batch_is_planned() -> None:
    """The memory is that of the largest need, the time is said of each size."""
    path = ROOT / "recipes/tokenizer_demo.yaml"
    settings = ["train.micro_batch=32", "strategy.name=ddp", "train.precision=bf16"]

    def planned(batch: str) -> tuple[Memory, list[Expected]]:
        recipe = load(path, [*settings, f"train.global_batch={batch}"]).recipe
        return plan(recipe, 8)[0], expect(recipe, 8, GPUS[1:2])

    changing = "{0: 64, 1000: 256, 2000: 512}"
    (small, one), (_, two), (large, four), (every, each) = map(planned, ("64", "256", "512", changing))
    assert (small.micro_batch, large.micro_batch, every.micro_batch) == (8, 32, 32)
    assert every.peak == large.peak > small.peak
    assert [step.line for step in each] == [one[0].line, two[0].line, four[0].line]
    assert [step.samples for step in each] == [64, 256, 512]


def test_weights_that_stay_gathered_count() -> None:
    path, shards = ROOT / "recipes/tokenizer_sim_droid.yaml", ["strategy.name=fsdp", "train.micro_batch=2"]
    given_back, kept = (
        plan(load(path, [*shards, f"strategy.reshard_after_forward={back}"]).recipe, 8)[0] for back in ("true", "false")
    )
    assert kept.gathered > 2 * kept.trained_numel > 2 * given_back.gathered, "all of it in bf16"
    with pytest.raises(RecipeError, match=r"strategy.reshard_after_forward: is of fsdp and hsdp"):
        load(path, ["strategy.reshard_after_forward=false"])


@pytest.mark.slow
def test_the_page_says_what_is_planned_of_recomputation() -> None:
    rows = re.findall(
        r"^\| \**(\d+)(?:, twice a step)?\**(?: \|) \**(true|false|\d)\** \| \**([\d.]+)[^|]*\| \**(\d+) %",
        (ROOT / "docs/gpu.md").read_text(), re.MULTILINE,
    )  # fmt: skip
    assert len(rows) == 5
    for micro_batch, recomputed, gigabytes, mfu in rows:
        settings = [f"train.micro_batch={micro_batch}", f"train.gradient_checkpointing={recomputed}"]
        recipe = load(ROOT / "recipes/policy_openvla_state.yaml", settings).recipe
        (memory,), (step,) = plan(recipe, 8), expect(recipe, 8, GPUS[1:2])
        assert (f"{memory.peak / 1e9:.1f}", f"{step.mfu:.0%}") == (gigabytes, f"{mfu}%"), settings


def test_whole_gradients_count_and_hsdp_is_advised_for_many(stamo: Any) -> None:
    path = ROOT / "recipes/policy_openvla_state.yaml"
    settings = ["train.global_batch=1024", "train.micro_batch=16", "strategy.name=fsdp"]
    sharded, whole = (
        plan(load(path, [*settings, f"strategy.gradients={kept}"]).recipe, 8)[0] for kept in ("sharded", "whole")
    )
    assert whole.gradients == 4 * whole.trained_numel == 8 * sharded.gradients
    check = (
        "recipe",
        "check",
        path,
        "--offline",
        *(part for setting in settings for part in ("--set", setting)),
        "--world-size",
    )
    assert "fsdp gathers every block over all 512 processes; hsdp" in stamo(*check, 512).stdout
    assert "hsdp" not in stamo(*check, 256).stdout


def test_the_command_says_it_in_json_and_refuses_the_unknown(stamo, toy_policy: Path, tmp_path: Path) -> None:
    recipe = write_policy_recipe(tmp_path / "toy.yaml", toy_policy, strategy="fsdp")
    (found,) = json.loads(stamo("plan", recipe, "--gpus", 2, "--json", "--set", "train.precision=bf16").stdout)
    assert [step["gpu"] for step in found["expected"]] == [gpu.name for gpu in GPUS]
    assert found["strategy"] == "fsdp"
    assert found["peak"] > found["activations"] > 0
    assert found["notes"] == [], "the toy's data and tokenizer are there"
    with pytest.raises(RecipeError, match=r"policy.weights: there is no config.json in owner/other, .* known: openvla"):
        plan(load(recipe, ["policy.weights=owner/other"]).recipe, 2)
    with pytest.raises(ValueError, match=r"strategy.shard_group: 3 does not divide 8 processes"):
        plan(load(recipe, ["strategy.name=hsdp", "strategy.shard_group=3"]).recipe, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_served_policy_holds_what_is_planned(toy_policy: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    recipe = load(write_policy_recipe(tmp_path / "toy.yaml", toy_policy)).recipe
    task = build_task(recipe, Mixture(recipe.data, seed=0, global_batch=8))
    task.export(tmp_path / "model", task.trained.state_dict(), [], ExportLayout(dtype=dtype))
    policy = load_policy(tmp_path / "model")
    assert policy.vision is not None
    modules = [policy.network, policy.vision.tokenizer]
    found = [sum(t.nbytes for t in (*module.parameters(), *module.buffers())) for module in modules]
    parts, _ = serving(recipe, dtype)
    assert [part.size for part in parts if part.held] == found
    whole = Tokenizer.from_pretrained(toy_policy / "tokenizer")
    assert sum(part.numel for part in parts[1:]) == sum(p.numel() for p in whole.parameters())


def test_a_full_size_policy_fits_a_card_of_24_gb(stamo: Any) -> None:
    printed = stamo("plan", "recipes/policy_openvla_state.yaml", "--serve", "bfloat16").stdout
    page = (ROOT / "docs/serve.md").read_text()
    numbers = ["6,787.2", "13.57", "355.7", "1.42", "2,107.4", "8.66", "15.00", "8.66"]
    assert re.findall(r"[\d,]+\.\d+", printed.partition("Weights alone")[0]) == numbers
    assert re.findall(r"[\d,]+\.\d+", page.partition("| policy | ")[2].partition("\n\n")[0]) == numbers
    with pytest.raises(RecipeError, match="only a policy is served"):
        serving(load(ROOT / "recipes/tokenizer_sim.yaml").recipe)


def test_a_diffusion_policy_counts_as_what_it_trains(ranks, toy_policy: Path, tmp_path: Path) -> None:
    recipe = write_diffusion_recipe(tmp_path / "toy.yaml", toy_policy)
    (found,) = [m for m in plan(load(recipe).recipe, 1) if m.strategy == "ddp"]
    ranks(1, "train", recipe, "--set", "train.steps=1")
    trained = load_file(tmp_path / "run/model/model.safetensors")
    assert found.trained_numel == sum(tensor.numel() for tensor in trained.values())
    assert found.frozen_numel > 0, "the tokenizer it sees through"
    assert found.peak > found.activations > 0
