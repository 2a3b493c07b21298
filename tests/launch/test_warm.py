"""What the tests start by a fork (tests/warm.py) does what a user's command does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy import write_recipe
from warm import Warm

ROOT = Path(__file__).resolve().parents[2]


def cold(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stamo_dist.cli", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=ROOT)


def said(text: str, folder: Path) -> list[str]:
    """The lines, without what is measured and where, and without progress, which is told by the clock."""
    text = re.sub(r"[\d.]+ s\b|\(\d+ steps? of .*", "N", text.replace(str(folder), "RUN"))
    return [line for line in text.splitlines() if not line.startswith("step ")]


def losses(folder: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def test_two_ranks_train_the_same(toy: SimpleNamespace, warm: Warm, tmp_path: Path) -> None:
    found = {}
    for name, start in (("cold", cold), ("warm", warm.run)):
        recipe = write_recipe(tmp_path / name / "toy.yaml", toy.shards, toy.vae, strategy="zero2", workers=1)
        done = start("train", recipe, "--nproc", 2, "--set", "train.steps=4", "--set", "train.checkpoint.every=2")
        files = {str(path.relative_to(recipe.parent)) for path in recipe.parent.rglob("*")}
        files = {re.sub(r"watch_\w+", "watch", file) for file in files}
        found[name] = done.returncode, said(done.stdout, recipe.parent), done.stderr, losses(recipe.parent), files
    assert found["warm"][0] == 0, found["warm"]
    for one, other in zip(found["cold"], found["warm"], strict=True):
        assert one == other


def test_a_refusal_is_the_same(toy: SimpleNamespace, warm: Warm, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    for words in (("train", recipe, "--nproc", 3), ("train", recipe, "--nope"), ("eval", "reconstruct", tmp_path)):
        one, other = cold(*words), warm.run(*words)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
        assert one.returncode == 2


def test_what_an_import_may_have_read_is_not_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = Warm(tmp_path, os.environ)  # the session's may have begun before another test's imports set variables
    assert warm.fits(["train", "toy.yaml"])
    assert not warm.fits(["recipe", "check", "toy.yaml"])
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")
    assert not warm.fits(["train", "toy.yaml"])
