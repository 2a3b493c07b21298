"""Measured by two processes, the result is that of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stamo_dist.evaluate.probe import probe
from stamo_dist.evaluate.reconstruct import reconstruct


def test_two_processes_find_what_one_finds(run: Path, ranks: Callable[..., Any], tmp_path: Path):
    alone = {
        "reconstruct": reconstruct(run, frames=10, batch=3, out=tmp_path / "reconstruct"),
        "probe": probe(run, ks=(1, 3), seeds=2, epochs=2, out=tmp_path / "probe"),
    }
    ranks(2, "eval", "reconstruct", run, "--frames", "10", "--batch", "3")
    for path in (run / "eval" / "features").iterdir():
        path.unlink()
    ranks(2, "eval", "probe", run, "--k", "1", "--k", "3", "--seeds", "2", "--epochs", "2")
    for name, result in alone.items():
        folder = run / "eval" / name
        assert json.loads((folder / f"{name}.json").read_text())["rows"] == result.rows
        assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / name).iterdir()}
        for figure in result.figures:
            assert (folder / figure.file).read_bytes() == (tmp_path / name / figure.file).read_bytes()


def test_the_command_starts_its_processes_and_passes_on_what_is_wrong(run: Path, stamo: Callable[..., Any]):
    result = stamo("eval", "probe", run, "--nproc", "2", "--k", "40", check=False)
    assert result.returncode == 2
    assert "k = 40 needs 2 training episode(s) of 41 frames" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (run / "eval").exists()
