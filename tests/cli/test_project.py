"""What `stamo init` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_the_toy_of_a_new_project_is_without_fault(stamo: Any, tmp_path: Path) -> None:
    stamo("init", tmp_path / "mine")
    raw, shards = tmp_path / "mine/raw/toy", tmp_path / "shards"
    stamo("data", "convert", "libero", raw, shards, "--size", 64, "--val-fraction", 0.2)
    assert "0 errors, 0 warnings" in stamo("data", "check", shards).stdout
