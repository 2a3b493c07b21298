"""What torch.compile makes is kept beside the run: a later start on another node does not compile it again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stamo_dist.run.own import seal
from stamo_dist.run.state import RunState
from stamo_dist.training.compiled import CompiledHook

START = """
import sys
from pathlib import Path
import torch
from stamo_dist.run.state import RunState
from stamo_dist.training.compiled import CompiledHook

class Logger:
    info = staticmethod(print)

hook = CompiledHook(Path(sys.argv[1]), Logger(), writes=True)
hook.before_step(RunState(), None)
torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()))(torch.ones(2, 4)).sum().backward()
hook.after_step(RunState(1), None)
hook.after_step(RunState(2), None)
"""


@pytest.mark.slow  # it compiles, twice
def test_a_second_start_finds_what_the_first_compiled(tmp_path: Path) -> None:
    def start(node: str, user: str = "me") -> list[str]:
        """On a node whose own cache is empty."""
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / node), "XDG_STATE_HOME": str(tmp_path / user)}
        command = [sys.executable, "-c", START, str(tmp_path / "run/compiled/gpu_00.bin")]
        return subprocess.run(
            command, check=True, text=True, env=env, stdout=subprocess.PIPE, timeout=300
        ).stdout.splitlines()

    (tmp_path / "run").mkdir()
    assert start("a") == ["torch.compile: 0 graphs were there, 2 were compiled"], "forward and backward"
    assert start("b") == ["torch.compile: 2 graphs were there, 0 were compiled"]
    said = start("c", "somebody else")
    assert "gpu_00.bin: was not written by a run of yours, and is not run; compiling anew" in said[0]
    assert said[1] == "torch.compile: 0 graphs were there, 2 were compiled"


class Said(list):
    info = list.append


@pytest.mark.parametrize("kind", ["damaged", "foreign"])
def test_what_cannot_be_used_is_said(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, said = tmp_path / "gpu_00.bin", Said()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    content = b"nothing that was compiled"
    file.write_bytes(content if kind == "foreign" else seal(content))
    CompiledHook(file, said, writes=True).before_step(RunState(), None)  # type: ignore[arg-type]
    wanted = {"damaged": "cannot be read, compiling anew", "foreign": "was not written by a run of yours"}[kind]
    assert len(said) == 1
    assert wanted in said[0]
    assert (tmp_path / "stamo/key").stat().st_mode & 0o777 == 0o600
