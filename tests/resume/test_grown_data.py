"""A source that grows under a run: the run goes on with what it began with, to the bit, and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toy import make_source, write_recipe

from stamo_dist.data.schema import MANIFEST, Size, Split, read_manifest
from stamo_dist.report.page import read_run
from stamo_dist.run.folder import RunFolder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def said_of(run: Path) -> Any:
    """What was measured while it trained, and the mixture in the report."""
    rows = json.loads((run / "eval" / "during" / "during.json").read_text())["rows"]
    return rows, [{k: v for k, v in row.items() if k != "path"} for row in read_run(RunFolder(run)).mixture]


def test_a_run_goes_on_with_what_it_began_with(toy: SimpleNamespace, stamo: Callable[..., Any], tmp_path: Path):
    shards = tmp_path / "shards"
    for name in "ab":
        make_source(shards, name, episodes=6, shard_bytes=1)  # a shard a frame: it may be cut anywhere
    grown = read_manifest(shards / "a")
    small = {name: Split(episodes=4, frames=48) for name in grown.splits}
    before = grown.model_copy(update={"splits": small})
    after = grown.model_copy(update={"before": [Size(splits=small, digest=before.digest)]})
    (shards / "a" / MANIFEST).write_text(before.model_dump_json())
    shutil.copytree(shards, tmp_path / "as_it_was")

    whole, cut = (
        write_recipe(tmp_path / name / "toy.yaml", data, toy.vae)
        for name, data in (("whole", tmp_path / "as_it_was"), ("cut", shards))
    )
    common = ["--set", "train.checkpoint.every=2", "--set", "optimizer.schedule=constant"]
    common += ["--set", "evaluate.every=2", "--set", "evaluate.reconstruct=2"]
    stamo("train", whole, *common, "--set", "train.steps=6")
    stamo("train", cut, *common, "--set", "train.steps=2")
    (shards / "a" / MANIFEST).write_text(after.model_dump_json())
    said = stamo("train", cut, *common, "--set", "train.steps=6").stdout
    assert f"{shards}/a: has grown by 4 episodes since this run began, which goes on without them" in said
    assert losses(tmp_path / "cut" / "run") == losses(tmp_path / "whole" / "run")
    assert said_of(tmp_path / "cut" / "run") == said_of(tmp_path / "whole" / "run")

    refused = stamo("train", cut, *common, "--set", "train.steps=8", "--set", "seed=1", check=False)
    assert refused.returncode == 2, "what else changed is still refused"
    fresh = write_recipe(tmp_path / "fresh" / "toy.yaml", shards, toy.vae)
    assert "has grown" not in stamo("train", fresh, *common, "--set", "train.steps=1").stdout
    assert losses(tmp_path / "fresh" / "run") != losses(tmp_path / "whole" / "run")[:1]
    said = stamo("train", cut, *common, "--set", "train.steps=7", "--allow-changed-data").stdout
    assert "has grown" not in said
