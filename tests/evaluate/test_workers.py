"""Measured by two processes, the result is that of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stamo_dist.evaluate.interpolate import Interpolation
from stamo_dist.evaluate.probe import ActionProbe
from stamo_dist.evaluate.reconstruct import Reconstruction
from stamo_dist.evaluate.transfer import MotionTransfer
from stamo_dist.models.tokenizer import Tokenizer


def test_two_processes_find_what_one_finds(run: Path, ranks: Callable[..., Any], tmp_path: Path):
    alone = {
        "reconstruct": Reconstruction(run, frames=10, batch=3, out=tmp_path / "reconstruct").evaluate(),
        "interpolate": Interpolation(run, episodes=2, points=4, span=6, out=tmp_path / "interpolate").evaluate(),
        "transfer": MotionTransfer(run, pairs=1, points=3, span=4, out=tmp_path / "transfer").evaluate(),
        "probe": ActionProbe(run, k=(1, 3), seeds=2, epochs=2, out=tmp_path / "probe").evaluate(),
    }
    ranks(2, "eval", "reconstruct", run, "--frames", "10", "--batch", "3")
    ranks(2, "eval", "interpolate", run, "--episodes", "2", "--points", "4", "--span", "6")
    ranks(2, "eval", "transfer", run, "--pairs", "1", "--points", "3", "--span", "4")
    for path in (run / "eval" / "features").iterdir():
        path.unlink()
    ranks(2, "eval", "probe", run, "--k", "1", "--k", "3", "--seeds", "2", "--epochs", "2")
    for name, result in alone.items():
        folder = run / "eval" / name
        assert json.loads((folder / f"{name}.json").read_text())["rows"] == result.rows
        assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / name).iterdir()}
        for figure in result.figures:
            assert (folder / figure.file).read_bytes() == (tmp_path / name / figure.file).read_bytes()


class KilledError(Exception):
    """As kill -9 would: nothing after it runs."""


@pytest.mark.parametrize("name", ["reconstruct", "interpolate", "transfer"])
def test_a_killed_one_is_marked_partial_and_goes_on(name: str, run: Path, monkeypatch: pytest.MonkeyPatch):
    measure, options = {
        "reconstruct": (Reconstruction, {"frames": 8, "batch": 4}),
        "interpolate": (Interpolation, {"episodes": 2, "points": 3}),
        "transfer": (MotionTransfer, {"pairs": 1, "points": 3}),
    }[name]
    whole = measure(run, **options).evaluate()
    folder = run / "eval" / name
    files = {path.name for path in folder.iterdir()}
    decode, frames = Tokenizer.decode, []

    def count(self: Tokenizer, *arguments: Any) -> Any:
        if len(frames) == stop:
            raise KilledError
        frames.append(1)
        return decode(self, *arguments)

    monkeypatch.setattr(Tokenizer, "decode", count)
    each = {"reconstruct": 1, "interpolate": 2, "transfer": 2}[name]  # decodings of a part
    stop = each
    with pytest.raises(KilledError):
        measure(run, **options).evaluate()
    kept = json.loads((folder / f"{name}.json").read_text())
    assert kept["partial"].startswith({"reconstruct": "4 of 16 frames"}.get(name, "1 of 4"))
    assert 0 < len(kept["rows"]) < len(whole.rows)
    assert all((folder / figure["file"]).is_file() for figure in kept["figures"])
    stop = 1000
    frames.clear()
    assert measure(run, **options).evaluate().rows == whole.rows
    pictures = 4 if name == "reconstruct" else 0  # five frames of each source, four at a time
    assert len(frames) == 3 * each + pictures, "the part that was there was not measured again"
    assert {path.name for path in folder.iterdir()} == files


def test_the_command_starts_its_processes_and_passes_on_what_is_wrong(run: Path, stamo: Callable[..., Any]):
    result = stamo("eval", "probe", run, "--nproc", "2", "--k", "40", check=False)
    assert result.returncode == 2
    assert "k = 40 needs 2 training episode(s) of 41 frames" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (run / "eval").exists()
