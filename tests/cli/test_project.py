"""What `stamo init` writes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def test_the_toy_of_a_new_project_is_without_fault(stamo: Any, tmp_path: Path) -> None:
    stamo("init", tmp_path / "mine")
    raw, shards = tmp_path / "mine/raw/toy", tmp_path / "shards"
    stamo("data", "convert", "libero", raw, shards, "--size", 64, "--val-fraction", 0.2)
    assert "0 errors, 0 warnings" in stamo("data", "check", shards).stdout


def test_the_demonstration_ends_what_it_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stamo_dist.cli", "demo"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline().startswith("$ stamo data simulate libero")
        demo.send_signal(signal.SIGTERM)
        said = demo.communicate(timeout=60)[1]  # which waits for the command that it runs, too
    assert said.endswith("ended by SIGTERM; `stamo demo` goes on\n")
    assert demo.returncode == 128 + signal.SIGTERM
