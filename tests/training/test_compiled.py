"""What torch.compile makes is kept beside the run: a later start on another node does not compile it again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy import write_recipe

from stamo_dist.run.state import RunState
from stamo_dist.training.compiled import CompiledHook


def test_a_second_start_finds_what_the_first_compiled(toy, tmp_path: Path, repo_root: Path) -> None:
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)

    def train(steps: int, node: str) -> str:
        """On a node whose own cache is empty."""
        command = [sys.executable, "-m", "stamo_dist.cli", "train", recipe, "--set", "train.compile=true"]
        settings = [f"train.steps={steps}", "train.dry_export=false", "optimizer.schedule=constant"]
        done = subprocess.run(
            [*map(str, command), *(word for s in settings for word in ("--set", s))], check=False, text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / node)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=repo_root, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    first = re.search(r"torch.compile: (\d+) graphs were there, (\d+) were compiled", train(2, "a"))
    assert first, "the first start says what it compiled"
    assert first[1] == "0"
    assert (tmp_path / "run/compiled/gpu_00.bin").stat().st_size > 1000
    second = train(3, "b")
    assert f"torch.compile: {first[2]} graphs were there, 0 were compiled" in second


class Said(list):
    info = list.append


@pytest.mark.parametrize("kind", ["damaged", "foreign"])
def test_what_cannot_be_used_is_said(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, said = tmp_path / "gpu_00.bin", Said()
    file.write_bytes(b"nothing that was compiled")
    if kind == "foreign":
        monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    CompiledHook(file, said, writes=True).before_step(RunState(), None)  # type: ignore[arg-type]
    wanted = {"damaged": "cannot be read, compiling anew", "foreign": "is another user's"}[kind]
    assert len(said) == 1
    assert wanted in said[0]
