"""Samples that cannot be read, with `data.on_bad_sample: skip`: counted per source over restarts, up to a budget."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from toy import write_recipe

STRIDE = 3  # every third frame of source b is broken


@pytest.fixture
def recipe(toy, tmp_path) -> Path:
    shutil.copytree(toy.shards, tmp_path / "shards")
    shard = tmp_path / "shards/b/train/front/shard.00000.mds"
    content = shard.read_bytes()
    starts = [m.start() for m in re.finditer(b"\xff\xd8\xff\xe0", content)]
    for at in starts[::STRIDE]:
        content = content[:at] + bytes(40) + content[at + 40 :]
    shard.write_bytes(content)
    return write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", toy.vae)


def test_the_budget_is_counted_over_restarts_and_names_the_source(ranks, recipe):
    run = recipe.parent / "run"

    def train(steps: int, budget: int, check: bool = True) -> tuple[int, str]:
        settings = (f"train.steps={steps}", "optimizer.schedule=constant", "data.on_bad_sample=skip")
        more = (x for s in (*settings, f"data.max_bad_samples={budget}") for x in ("--set", s))
        return ranks(2, "train", recipe, *more, check=check)

    train(10, 1000)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before = sum(line.get("skipped/b", 0) for line in lines)
    assert before > 2
    assert all(line.get("skipped", 0) == line.get("skipped/b", 0) for line in lines)
    marker = json.loads((run / "checkpoints/step_00000010/checkpoint.json").read_text())
    assert marker["state"]["skipped"] == [0, before]

    code, output = train(40, before + 2, check=False)
    assert code == 2, output
    assert "after step 10" in output
    found = re.search(
        r"error: data\.sources\.b: (\d+) of (\d+) samples could not be read, more than data\.max_bad", output
    )
    assert found, output
    assert before + 2 < int(found[1]) <= before + 2 + 8
    assert int(found[2]) > sum(line.get("samples/b", 0) for line in lines)
    assert "Traceback" not in output
    train(20, 1000)
