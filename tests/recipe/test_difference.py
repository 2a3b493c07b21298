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
from stamo_dist.run.recipe_history import as_of, changes_of

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


def test_changes_of_abandoned_steps_count_from_where_a_later_start_went_back_to(tmp_path):
    clip, steps = {"optimizer.clip": ["1.0", "2.0"]}, {"train.steps": ["10", "20"]}
    back = {"optimizer.clip": ["2.0", "1.0"]}
    starts = [{"after step": 0}, {"after step": 10, "changed": steps}, {"after step": 20, "changed": clip}]

    def changes(*later: dict) -> list:
        (tmp_path / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in [*starts, *later]))
        return changes_of(RunFolder(tmp_path))

    assert changes({"after step": 30}) == [(10, steps), (20, clip)]
    assert changes({"after step": 20}) == [(10, steps), (20, clip)], "killed before it saved"
    assert changes({"after step": 15}) == [(10, steps), (15, clip)]
    assert changes({"after step": 15, "changed": back}) == [(10, steps)]
    assert changes({"after step": 10, "changed": {"optimizer.clip": ["2.0", "3.0"]}}) == [
        (10, steps | {"optimizer.clip": ["1.0", "3.0"]})
    ]
    now = resolved(tmp_path, "optimizer.clip=3.0")
    assert as_of(RunFolder(tmp_path), deepcopy(now), 15) == now
    assert as_of(RunFolder(tmp_path), now, 10)["optimizer"]["clip"] == 1.0


def test_no_parts(tmp_path):
    with pytest.raises(RecipeError, match=r"init_from\.parts"):
        resolved(tmp_path, "init_from={path: /tmp/x, parts: []}")
    with pytest.raises(RecipeError, match=r"init_from\.parts: vision: the tokenizer stage has encoder, compressor, "):
        resolved(tmp_path, "init_from={path: /tmp/x, parts: [encoder, vision]}")
    with pytest.raises(RecipeError, match=r"parts: vae: .*; it is frozen here: name it as model\.vae\.weights"):
        resolved(tmp_path, "init_from={path: /tmp/x, parts: [vae]}")
