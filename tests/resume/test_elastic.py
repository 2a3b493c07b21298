"""A run goes on under another strategy and on other processes, with the samples and losses it would have had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import write_recipe

STEPS = 3  # of each shape: the first shows the weights that were read, the next two the moments and their step

Shape = tuple[str, int]  # strategy, processes

# Between them: every strategy is read and written, more and fewer processes, sizes that divide nothing evenly.
CHAINS: dict[str, tuple[int, list[Shape]]] = {
    "zero": (8, [("zero2", 2), ("zero2", 1), ("zero2", 2), ("zero3", 2), ("zero3", 1), ("zero1", 2)]),
    "across": (8, [("ddp", 1), ("fsdp", 2), ("zero2", 2), ("hsdp", 2), ("zero3", 2), ("ddp", 1)]),
    "sizes": (12, [("zero3", 2), ("zero3", 4), ("zero2", 3)]),
}


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def averages(run: Path) -> dict[str, torch.Tensor]:
    """The exported weights, which are the moving average's."""
    return load_file(run / "model/transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def start(toy, ranks):
    """Train the toy recipe in `folder` in one shape up to `steps`; returns what was printed."""

    def train(folder: Path, batch: int, shape: Shape, steps: int, precision: str = "fp32") -> str:
        recipe = folder / "toy.yaml"
        if not recipe.exists():
            write_recipe(recipe, toy.shards, toy.vae)
        # The schedule may not depend on train.steps, which is where each part of a chain ends.
        settings = {
            "strategy.name": shape[0], "train.steps": steps, "train.global_batch": batch, "train.ema": 0.9,
            "train.precision": precision, "optimizer.schedule": "constant",
        }  # fmt: skip
        return ranks(shape[1], "train", recipe, *(x for k, v in settings.items() for x in ("--set", f"{k}={v}")))[1]

    return train


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The run folder of a run that never stopped, for a global batch."""
    made: dict[int, Path] = {}

    def run(batch: int) -> Path:
        if batch not in made:
            made[batch] = tmp_path_factory.mktemp("uninterrupted")
            steps = max(len(shapes) for b, shapes in CHAINS.values() if b == batch) * STEPS
            start(made[batch], batch, ("ddp", 1), steps)
        return made[batch] / "run"

    return run


@pytest.mark.parametrize("chain", CHAINS)
def test_chain_of_shapes(start, uninterrupted, tmp_path, chain):
    batch, shapes = CHAINS[chain]
    for i, shape in enumerate(shapes):
        output = start(tmp_path, batch, shape, (i + 1) * STEPS)
        if i:
            assert f"continuing {tmp_path}/run/checkpoints/step_{i * STEPS:08d} after step {i * STEPS}" in output
            if shape != shapes[i - 1]:
                assert f"was written by {shapes[i - 1][0]} on {shapes[i - 1][1]} processes" in output
    expected, got = metrics(uninterrupted(batch)), metrics(tmp_path / "run")
    for e, g in zip(expected, got, strict=True):
        counts = {k: v for k, v in e.items() if k.startswith("samples/")}
        assert g["step"] == e["step"]
        assert {k: v for k, v in g.items() if k.startswith("samples/")} == counts
        part = shapes[(g["step"] - 1) // STEPS]
        assert g["loss"] == pytest.approx(e["loss"], rel=1e-5), (g["step"], part)
        assert g["grad_norm"] == pytest.approx(e["grad_norm"], rel=1e-4), (g["step"], part)
    expected_average, average = averages(uninterrupted(batch)), averages(tmp_path / "run")
    for name, weight in expected_average.items():
        torch.testing.assert_close(average[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_three_and_more_are_bit_identical(start, tmp_path, strategy):
    """A sum of two does not depend on their order; one of four does."""
    start(tmp_path / "whole", 8, (strategy, 4), 6)
    for steps in (3, 6):
        start(tmp_path / "broken", 8, (strategy, 4), steps)
    whole, broken = (
        [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(tmp_path / name / "run")]
        for name in ("whole", "broken")
    )
    assert broken == whole
    assert all(map(torch.equal, averages(tmp_path / "whole/run").values(), averages(tmp_path / "broken/run").values()))
    parts = [p.stat().st_size for p in (tmp_path / "whole/run/checkpoints/step_00000006/state").glob("*.safetensors")]
    assert len(parts) == 4
    assert max(parts) < 0.4 * sum(parts), "each process writes its share of weights, moments and average"


def test_zero1_in_bf16(start, tmp_path):
    """DeepSpeed has another optimizer class and other files for it."""
    start(tmp_path / "whole", 8, ("zero2", 1), 3 * 2, "bf16")
    for i, shape in enumerate([("zero1", 2), ("zero1", 1), ("zero3", 1)]):
        start(tmp_path / "chain", 8, shape, (i + 1) * 2, "bf16")
    losses = [[m["loss"] for m in metrics(tmp_path / name / "run")] for name in ("whole", "chain")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_cannot_go_on_is_refused(start, ranks, tmp_path):
    """Another model, and a number of processes that does not divide the batch: said clearly, and nothing is trained."""
    start(tmp_path, 8, ("zero2", 1), 1)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    code, output = ranks(
        2, "train", tmp_path / "toy.yaml", "--allow-changed-model", "--set", "strategy.name=fsdp",
        "--set", "train.steps=2", "--set", "optimizer.schedule=constant",
        "--set", "model.encoder.config={patch_size: 8, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}",
        check=False,
    )  # fmt: skip
    assert code == 2
    assert "trained parameters are missing, new or of another size: encoder." in output
    assert "Traceback" not in output

    code, output = ranks(3, "train", tmp_path / "toy.yaml", "--set", "train.steps=2", check=False)
    assert code == 2
    assert "8 is not divisible by 3 processes; it runs on 1, 2, 4, 8" in output
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
