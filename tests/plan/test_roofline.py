"""What a step is predicted to take: its operators counted by hand, and the settings that must make it faster."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.models.flops import shapes_only
from stamo_dist.models.recompute import run_block
from stamo_dist.plan.operators import REST, fused, traced
from stamo_dist.plan.roofline import GPUS, Expected, expect
from stamo_dist.recipe.load import load

ROOT = Path(__file__).parents[2]


class Two(nn.Module):
    """Two products with three memory-bound operators between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second((self.first(x).sigmoid() * 2).tanh())


def test_operators_are_counted_by_hand_and_belong_to_their_part() -> None:
    with torch.device("meta"):
        model = Two()
    with shapes_only(model):
        found = traced(lambda: model(torch.empty(32, 64)).sum(), {"two": [model]})
    product = 2 * 32 * 64 * 256
    forward = [op for op in found if op.part == "two" and not op.backward]
    assert [op.kind for op in forward] == ["gemm", "memory", "memory", "memory", "gemm"]
    backward = [op for op in found if op.part == "two" and op.backward and op.kind == "gemm"]
    assert [op.flops for op in forward if op.flops] == [product] * 2
    assert [op.flops for op in backward] == [product] * 3, "the input has no gradient"
    small, wide = 4 * 32 * 64, 4 * 32 * 256
    weight = 4 * 64 * 256
    assert forward[0].bytes == small + weight + wide
    assert [op.bytes for op in forward[1:4]] == [2 * wide] * 3
    assert {op.part for op in found} == {"two", REST}
    once = [op for op in fused(found) if op.part == "two" and not op.backward]
    assert [op.kind for op in once] == ["gemm", "memory", "gemm"]
    # Reads what the first product gave; sigmoid and tanh are wanted again by the backward pass, the doubled is not.
    assert once[1].bytes == 3 * wide


def test_what_is_recomputed_is_told_apart() -> None:
    with torch.device("meta"):
        blocks = nn.ModuleList(Two() for _ in range(4))

    def step() -> torch.Tensor:
        x = torch.empty(32, 64, requires_grad=True)
        for number, block in enumerate(blocks):
            x = run_block(block, number, 2, x)
        return x.sum()

    with shapes_only(blocks):
        found = traced(step, {"blocks": list(blocks)})
    products = [op for op in found if op.kind == "gemm"]
    # Blocks 0 and 2; what comes after the last tensor that a backward pass wants is not computed again.
    assert [op.flops for op in products if op.again] == [2 * 32 * 64 * 256] * 2
    assert len([op for op in products if not op.again]) == 4 * 2 * 3
    assert {op.part for op in products} == {"blocks"}


@functools.cache
def predicted(recipe: str, *settings: str, gpus: int = 8) -> Expected:
    """On H100s."""
    return next(step for step in expect(load(ROOT / f"recipes/{recipe}.yaml", list(settings)).recipe, gpus, GPUS[1:2]))


def test_the_full_size_policies_reach_their_goals_in_the_prediction() -> None:
    assert predicted("policy_openvla_state").mfu > 0.55
    assert predicted("policy_openvla_lora").mfu > 0.45


def test_predictions_know_the_levers() -> None:
    tokenizer = predicted("tokenizer_sim_droid")
    assert sum(tokenizer.by_part.values()) == pytest.approx(sum(tokenizer.by_class.values()))
    assert {"VAE", "encoder", "compressor", "DiT", "optimizer", "EMA", "communication"} <= set(tokenizer.by_part)
    assert tokenizer.useful_flops * 8 / 768 / 1e12 == pytest.approx(1.59, rel=0.01)
    assert predicted("tokenizer_sim_droid", "train.micro_batch=48").seconds > tokenizer.seconds
    small = ("tokenizer_demo", "train.precision=bf16", "train.compile=true")
    assert predicted(*small, "train.compile=false").mfu < predicted(*small).mfu
    sharded = predicted(*small, "strategy.name=fsdp")
    assert sharded.by_part["communication"] < predicted(*small).by_part["communication"]
    assert predicted(*small, gpus=1).by_part.get("communication") is None
    some, every = (predicted("policy_openvla_lora", f"train.gradient_checkpointing={k}") for k in ("4", "true"))
    assert 0 < some.by_class["recomputed"] < 0.3 * every.by_class["recomputed"]
    assert some.useful_flops == every.useful_flops, "MFU counts no recomputation"


def test_gathering_over_nodes_is_no_longer_hidden() -> None:
    settings = ("train.global_batch=256", "train.micro_batch=4")
    kept = predicted("policy_openvla_state", "strategy.reshard_after_forward=false", *settings, gpus=64)
    given_back = predicted("policy_openvla_state", *settings, gpus=64)
    assert 0 < kept.by_part["communication"] < given_back.by_part["communication"]


def test_the_command_calls_it_a_prediction(stamo: Any) -> None:
    printed = stamo("plan", "recipes/policy_openvla_state.yaml", "--gpus", 8).stdout
    lines = [line for line in printed.splitlines() if line.startswith("expected")]
    assert [line.split()[1] for line in lines] == [f"{gpu.name}:" for gpu in GPUS]
    assert all(line.endswith("(prediction)") for line in lines)
    page = (ROOT / "docs/gpu.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `policy_openvla_state`"))
    rate, share = next(line for line in lines if "H100" in line).split("a step, ")[1].split(" samples/s, MFU ")
    assert f"{rate}/s, {share.split('%')[0]} %" in row
    assert expect(load(ROOT / "recipes/tokenizer_demo.yaml").recipe, 2) == [], "it computes in fp32"
