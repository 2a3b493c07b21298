"""Measuring while it trains: what is found is written, and the training does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toy import write_recipe

from stamo_dist.report import write_report


def test_the_training_is_the_same_to_the_bit(toy: SimpleNamespace, stamo: Callable[..., Any], tmp_path: Path):
    common = ["train.steps=6", "train.checkpoint.every=2", "train.ema=0.5", "evaluate.reconstruct=3"]
    weights = {}
    for name, every in (("plain", "null"), ("measured", "4")):
        recipe = write_recipe(tmp_path / name / "toy.yaml", toy.shards, toy.vae)
        settings = [*common, f"evaluate.every={every}", "evaluate.probe=[2]"]
        said = stamo("train", recipe, *(x for s in settings for x in ("--set", s))).stdout
        run = tmp_path / name / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights[name] = (
            [(line["step"], line["loss"], line["grad_norm"]) for line in lines],
            (run / "model" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes(),
        )
    assert weights["plain"] == weights["measured"]
    assert "step 4 evaluated in" in said
    assert {"eval/a/psnr_moving", "eval/b/psnr", "eval/a/mse_2"} <= set(lines[4]), "with the line of the step after"

    result = json.loads((run / "eval" / "during" / "during.json").read_text())
    assert [(row["step"], row["source"]) for row in result["rows"]] == [(4, "a"), (4, "b")]
    assert all(row["psnr"] > 0 and row["mse_2"] > 0 for row in result["rows"])
    assert not (tmp_path / "plain" / "run" / "eval").exists()
    page = write_report([run]).read_text()
    assert "While it trained" in page
    assert page.count("data:image/") >= 3, "the first batch and a picture of each source"


def test_what_cannot_be_measured_stops_nothing(toy: SimpleNamespace, stamo: Callable[..., Any], tmp_path: Path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    settings = ["train.steps=2", "train.checkpoint.every=1", "evaluate.every=1", "evaluate.probe=[90]"]
    said = stamo("train", recipe, *(x for s in settings for x in ("--set", s)))
    assert said.stdout.count("could not be evaluated: data.sources.a: k = 90") == 2
    settings[2] = "evaluate.every=3"
    settings[1] = "train.checkpoint.every=2"
    refused = stamo("train", recipe, *(x for s in settings for x in ("--set", s)), check=False)
    assert refused.returncode == 2
    assert "evaluate.every: 3 is no multiple of train.checkpoint.every (2)" in refused.stderr


def test_processes_that_were_stopped_before_it(toy: SimpleNamespace, ranks: Callable[..., Any], tmp_path: Path):
    found = {}
    for name, stops in (("alone", [4]), ("stopped", [2, 4])):
        recipe = write_recipe(tmp_path / name / "toy.yaml", toy.shards, toy.vae)
        run = tmp_path / name / "run"
        common = ["train.steps=4", "train.checkpoint.every=2", "evaluate.reconstruct=3", "evaluate.probe=[2]"]
        for stop in stops:
            every = 2 if stop == 4 else "null"  # as if it had been stopped right after the save of step 2
            settings = [*common[1:], f"train.steps={stop}", "optimizer.schedule=constant", f"evaluate.every={every}"]
            ranks(2, "train", recipe, *(x for s in settings for x in ("--set", s)))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[name] = [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines]
        assert len(json.loads((run / "eval" / "during" / "during.json").read_text())["rows"]) == 4
    assert found["alone"] == found["stopped"]
    assert {"eval/a/psnr", "eval/b/mse_2"} <= set(found["alone"][2])


def test_a_checkpoint_that_goes_next_is_measured_first(toy: SimpleNamespace, stamo: Callable[..., Any], tmp_path: Path):
    """The last save waits for the one before, which is not kept any longer then."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    settings = ["train.steps=3", "train.checkpoint.every=1", "train.checkpoint.keep=1"]
    settings += ["train.checkpoint.background=true", "evaluate.every=1", "evaluate.reconstruct=1"]
    said = stamo("train", recipe, *(x for s in settings for x in ("--set", s))).stdout
    assert "could not be evaluated" not in said
    assert all(f"step {step} evaluated in" in said for step in (1, 2, 3))
