"""What a recipe may ask of a policy's training changes its speed and memory, not what it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_policy import write_policy_recipe

TERMS = ("loss", "action", "world_mse", "grad_norm")


def losses(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{term: line[term] for term in TERMS} for line in lines]


def train(ranks, folder: Path, toy_policy: Path, processes: int, *settings: str) -> list[dict[str, float]]:
    recipe = write_policy_recipe(folder / "toy.yaml", toy_policy, strategy="fsdp")
    ranks(processes, "train", recipe, *(x for s in ("train.steps=3", *settings) for x in ("--set", s)))
    return losses(folder / "run")


@pytest.fixture(scope="module")
def plain(toy_policy, ranks, tmp_path_factory) -> list[dict[str, float]]:
    return train(ranks, tmp_path_factory.mktemp("plain"), toy_policy, 1)


@pytest.mark.parametrize(
    ("processes", "settings", "tolerance"),
    [
        (1, ("train.gradient_checkpointing=true",), 1e-5),
        (1, ("train.micro_batch=8",), 1e-5),
        (1, ("train.compile=true",), 1e-4),
        (2, ("train.precision=bf16", "train.gradient_checkpointing=true"), 3e-2),
    ],
    ids=["checkpointing", "accumulation", "compile", "bf16"],
)
def test_same_losses(toy_policy, ranks, tmp_path, plain, processes, settings, tolerance) -> None:
    for found, wanted in zip(train(ranks, tmp_path, toy_policy, processes, *settings), plain, strict=True):
        assert found == pytest.approx(wanted, rel=tolerance)
    assert (tmp_path / "run/compiled/gpu_00.bin").is_file() == ("train.compile=true" in settings)


def test_gradients_of_bf16_are_reduced_in_fp32() -> None:
    import torch

    from stamo_dist.distributed.strategies import _fsdp_plugin
    from stamo_dist.recipe.training import Strategy

    policy = _fsdp_plugin(Strategy(name="fsdp"), "bf16", ["Block"]).mixed_precision_policy
    assert policy is not None
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
