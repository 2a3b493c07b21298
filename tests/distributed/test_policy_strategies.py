"""A policy trains to the same losses under every way to spread it, videos without actions included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_policy import write_policy_recipe


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=["tokens", "regression"])
def reference(toy_policy, ranks, tmp_path_factory, request) -> tuple[str, list[dict]]:
    recipe = write_policy_recipe(
        tmp_path_factory.mktemp("reference") / "toy.yaml", toy_policy, actions=request.param, proprio=True
    )
    ranks(1, "train", recipe)
    return request.param, lines(recipe.parent / "run")


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("zero2", 2)])
def test_same_losses(toy_policy, ranks, tmp_path, reference, strategy, processes):
    actions, expected = reference
    recipe = write_policy_recipe(tmp_path / "toy.yaml", toy_policy, strategy=strategy, actions=actions, proprio=True)
    ranks(processes, "train", recipe)
    found = lines(tmp_path / "run")
    assert len(found) == len(expected) == 12
    terms = ("loss", "action/a", "world_mse/a", "world_mse/b", "world_l1/b", "grad_norm")
    for one, other in zip(found, expected, strict=True):
        assert {t: one.get(t) for t in terms} == pytest.approx({t: other.get(t) for t in terms}, rel=1e-4)
        assert "action/b" not in one
    assert expected[-1]["loss"] < expected[0]["loss"]
