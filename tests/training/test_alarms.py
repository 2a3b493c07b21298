"""Spikes of loss and gradient norm: found, said once, and the same after a restart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toy import write_recipe

from stamo_dist.tracking.alarms import SpikeAlarms


def series(steps: int, spikes: dict[int, float], seed: int = 0) -> list[dict[str, float]]:
    """A falling noisy loss and a gradient norm of heavy tails; loss and norm are multiplied in `spikes`."""
    rng = np.random.default_rng(seed)
    loss = (1 + np.exp(-np.arange(steps) / 100)) * (1 + 0.05 * rng.standard_normal(steps))
    norm = np.exp(0.3 * rng.standard_normal(steps))
    factor = np.array([spikes.get(step, 1.0) for step in range(steps)])
    return [{"loss": a, "grad_norm": b} for a, b in zip(loss * factor, norm * factor, strict=True)]


def alarms(lines: list[dict[str, float]], watch: SpikeAlarms) -> dict[int, dict[str, float]]:
    return {step: found for step, line in enumerate(lines) if (found := watch.look(line))}


@pytest.mark.parametrize("seed", range(5))
def test_only_spikes_are_alarms(seed):
    found = alarms(series(2000, {500: 3.0, 501: 3.0, 502: 3.0, 1200: 50.0}, seed), SpikeAlarms(200, 10))
    assert list(found) == [500, 1200]  # one of three steps is said once
    assert found[500]["loss"] > 10
    assert {"loss", "grad_norm"} == set(found[1200])


def test_what_is_no_number_is_left_out():
    watch = SpikeAlarms(20, 10)
    lines = [{"loss": float("nan"), "grad_norm": None}, {"step": 1}, *series(60, {50: 9.0})]
    assert list(alarms(lines, watch)) == [52]


def test_a_restart_changes_no_alarm():
    lines = series(600, {450: 4.0, 451: 4.0, 452: 4.0})
    whole = alarms(lines, SpikeAlarms(100, 10))
    for cut in (300, 450, 451, 452, 460):
        again = alarms(lines[cut:], SpikeAlarms(100, 10, lines[max(0, cut - 200) : cut]))
        assert {step + cut: z for step, z in again.items()} == {step: z for step, z in whole.items() if step >= cut}


def test_a_run_that_spikes_says_so(toy, stamo, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    common = ("--set", "train.steps=60", "--set", "optimizer.schedule=constant")
    stamo("train", recipe, *common, "--set", "train.steps=50", "--set", "train.checkpoint.every=50")
    said = stamo("train", recipe, *common, "--set", "optimizer.lr=3").stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    spikes = {line["step"]: line["alarms"] for line in lines if "alarms" in line}
    assert min(spikes) > 50
    first = min(step for step, names in spikes.items() if "loss" in names)
    assert f"ALARM step {first}: the loss is {lines[first - 1]['loss']:.4g}" in said
    assert "ALARM" in stamo("status", tmp_path / "run").stdout
