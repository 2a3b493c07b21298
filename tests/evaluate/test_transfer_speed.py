"""`stamo eval transfer` and `stamo eval speed` on a real (tiny) run, and two runs side by side in the report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_gpu import FakeGpu

from stamo_dist import device
from stamo_dist.errors import RunError
from stamo_dist.evaluate.speed import WARM, TokenizerSpeed
from stamo_dist.evaluate.transfer import ADDED, KINDS, PIXELS, STILL, MotionTransfer
from stamo_dist.report import write_report


def test_transfer_between_every_two_sources(run: Path):
    result = MotionTransfer(run, pairs=1, points=3, span=4).evaluate()
    rows = {(r["source"], r["image"]): r for r in result.rows}
    assert list(rows) == [(f"{a} → {b}", kind) for a in "ab" for b in "ab" for kind in KINDS]
    for (name, kind), row in rows.items():
        assert (row["cosine"] is None) == (kind == STILL)
        assert row["psnr_still"] > 0
        assert rows[name, PIXELS]["psnr_still"] > rows[name, ADDED]["psnr_still"], (
            "pixels that are still stay as they are"
        )
    assert len(result.figures) == 8
    for figure in result.figures:
        assert (run / "eval" / "transfer" / figure.file).is_file()


def test_speed_and_two_runs_side_by_side(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    result = TokenizerSpeed(run, batch=(1, 3), calls=5, device=["cpu"]).evaluate()
    assert [(r["part"].split(",")[0], r["batch"]) for r in result.rows] == [
        (part, batch) for batch in (1, 3) for part in ("encoder", "state", "decode")
    ]
    assert all(0 < r["low"] <= r["hz"] <= r["high"] for r in result.rows)
    with pytest.raises(RunError, match=r"--device tpu: this machine has cpu"):
        TokenizerSpeed(run, device=["tpu"]).evaluate()
    gpu = FakeGpu()
    monkeypatch.setattr(device, "_current", gpu)
    rows = TokenizerSpeed(run, batch=(1,), calls=5, device=["cpu"], out=tmp_path / "gpu").evaluate().rows
    monkeypatch.undo()
    assert [row["device"] for row in rows] == ["NVIDIA H100 80GB HBM3"] * 3
    assert gpu.cuda.said["synchronize"] == 3 * (5 + WARM), "each call is waited for"
    other = shutil.copytree(run, tmp_path / "other")
    TokenizerSpeed(other, batch=(1, 3), calls=5, device=["cpu"]).evaluate()
    page = write_report([run, other], tmp_path / "both.html").read_text()
    assert "Speed of the tokenizer, side by side" in page
    assert page.count("<td><b>") >= 5, "the better number of each row is marked"
    assert "side by side" not in write_report([run]).read_text()
