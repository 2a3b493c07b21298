"""What differs between two recipes, and a run's recipe as it was at an earlier step."""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest

from stamo_dist.errors import RecipeError
from stamo_dist.recipe.difference import differences
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.recipe_history import as_of

RECIPE = "data: {sources: {a: {path: a}, b: {path: b}}}\ntrain: {steps: 20}\n"
SETTINGS = (
    "optimizer.lr_scale={}", "optimizer.lr_scale={compressor.queries: 2}",
    "optimizer.lr_scale={compressor: 3, compressor.queries: 4}", "init_from=/tmp/x", "data.sources.b=null",
    "train.global_batch={0: 8, 10: 16}", "optimizer.lr=1e-5", "optimizer.clip=null",
)  # fmt: skip


def resolved(folder: Path, setting: str) -> dict:
    (folder / "r.yaml").write_text(RECIPE)
    return load(folder / "r.yaml", [setting]).resolved


def test_names_with_dots(tmp_path):
    old, new = (resolved(tmp_path, f"optimizer.lr_scale={{compressor.queries: {x}}}") for x in (2, 3))
    assert [str(change) for change in differences(old, new)] == ["optimizer.lr_scale.compressor.queries: 2.0 → 3.0"]


@pytest.mark.parametrize(("old", "new"), [pair for pair in product(SETTINGS, SETTINGS) if pair[0] != pair[1]])
def test_a_recipe_as_of_a_step(tmp_path, old, new):
    before, now = resolved(tmp_path, old), resolved(tmp_path, new)
    changed = {change.field: [change.old, change.new] for change in differences(before, now)}
    assert changed
    (tmp_path / "starts.jsonl").write_text(json.dumps({"after step": 10, "changed": changed}) + "\n")
    assert differences(before, as_of(RunFolder(tmp_path), deepcopy(now), 10)) == []
    assert differences(now, as_of(RunFolder(tmp_path), deepcopy(now), 11)) == []


def test_no_parts(tmp_path):
    with pytest.raises(RecipeError, match=r"init_from\.parts"):
        resolved(tmp_path, "init_from={path: /tmp/x, parts: []}")
