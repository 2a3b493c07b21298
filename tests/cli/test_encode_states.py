"""Cached states train like those computed in the step; killed and shared-out jobs write the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from toy import make_source
from toy_policy import write_diffusion_recipe, write_policy_recipe

CACHED = ("--set", "policy.targets=cached")


@pytest.fixture
def root(toy_policy: Path, tmp_path: Path) -> Path:
    """The toy's sources, copied, because the cache is written beside them."""
    return shutil.copytree(toy_policy, tmp_path / "data")


def curve(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    terms = ("loss", "grad_norm", "action/a", "world_mse/b", "world_l1/a", "pseudo/b")
    return [{t: line[t] for t in terms if t in line} for line in lines]


@pytest.mark.parametrize("write", [write_policy_recipe, write_diffusion_recipe])
def test_cached_states_train_like_online_ones(root: Path, ranks, tmp_path: Path, write) -> None:
    online, cached = write(tmp_path / "online/toy.yaml", root), write(tmp_path / "cached/toy.yaml", root)
    code, said = ranks(1, "train", cached, *CACHED, check=False)
    assert code == 2
    assert "policy.targets: cached, but there are no states of all shards in" in said
    assert f"run `stamo encode {cached} --set policy.targets=cached`, or set policy.targets: online" in said
    ranks(2, "encode", cached)
    ranks(1, "train", online)
    ranks(1, "train", cached, *CACHED)
    expected, found = curve(tmp_path / "online/run"), curve(tmp_path / "cached/run")
    assert len(expected) == 12
    for a, b in zip(expected, found, strict=True):
        assert b == pytest.approx(a, rel=1e-5)  # float32: only the order of sums in the encoder differs


def test_states_of_others_are_refused(root: Path, ranks, tmp_path: Path) -> None:
    recipe = write_policy_recipe(tmp_path / "toy.yaml", root)
    ranks(1, "encode", recipe)
    (folder,) = (root / "shards/a/train/front").glob("states-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert folder.name == f"states-{manifest['fingerprint'][:16]}"
    assert (manifest["shape"], manifest["samples"], manifest["precision"]) == ([2, 32], 48, "float32")

    shard = next(folder.glob("shard.*.json"))
    meta = json.loads(shard.read_text())
    shard.write_text(json.dumps({**meta, "shard": "of yesterday"}))
    assert "stale: the shard has changed since" in ranks(1, "train", recipe, *CACHED, check=False)[1]
    for found in root.rglob("states-*"):
        found.rename(found.with_name("states-0123456789abcdef"))
    assert "states-0123456789abcdef, of another model" in ranks(1, "train", recipe, *CACHED, check=False)[1]
    said = ranks(1, "train", recipe, *CACHED, "--set", "data.augment.crop=0.9", check=False)[1]
    assert "cached states are of frames as they are" in said
    assert not (tmp_path / "run/checkpoints").exists() or not any((tmp_path / "run/checkpoints").iterdir())


def test_a_killed_job_goes_on_and_two_processes_write_what_one_does(root: Path, ranks, warm, tmp_path: Path) -> None:
    shutil.rmtree(root / "shards/a")
    source = make_source(root / "shards", "a", episodes=150, shard_bytes=12_000, splits=("train",))
    only = ("--set", "data.sources.b.weight=0")
    recipe = write_policy_recipe(tmp_path / "toy.yaml", root)
    job = warm.start("encode", recipe, "--nproc", "2", *only)
    shards = sorted((source / "train/front").glob("shard.*.mds"))
    deadline = time.monotonic() + 120
    while not (done := list((source / "train/front").glob("states-*/shard.*.json"))):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(job.pid, signal.SIGKILL)  # the kernel ends its ranks
    job.wait()
    time.sleep(0.5)
    done = list((source / "train/front").glob("states-*/shard.*.json"))
    assert 0 < len(done) < len(shards)
    folder = done[0].parent
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.npy") if p.with_suffix(".json") in done}

    ranks(2, "encode", recipe, *only)
    assert len(list(folder.glob("shard.*.json"))) == len(shards)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "whole shards are not written again"
    assert not list(folder.glob("*.tmp"))
    two = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "manifest.json" in two
    shutil.rmtree(folder)
    ranks(1, "encode", recipe, *only)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == two
