"""A run begun before files and fields were renamed goes on as if nothing had been."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from toy import make_source, make_vae, write_recipe

#: Steps 1 to 4 in metrics.jsonl, the checkpoint of step 2 and the first start's number, as commit c9db5ff wrote them.
RUN = Path(__file__).parent / "run_of_format_2.tar.xz"
SMALL = [
    "train.steps=4", "train.checkpoint.every=2", "model.compressor.width=16", "model.compressor.dim=16",
    "model.decoder.config={patch_size: 1, num_layers: 1, num_attention_heads: 1, attention_head_dim: 16}",
    "model.encoder.config={patch_size: 8, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
]  # fmt: skip


def read(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def test_a_run_of_checkpoint_format_2_goes_on(ranks, tmp_path) -> None:
    for name in "ab":
        make_source(tmp_path / "shards", name)
    recipe = write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", make_vae(tmp_path / "vae"))
    run = tmp_path / "run"
    with tarfile.open(RUN) as archive:
        archive.extractall(run, filter="data")
    before = read(run / "metrics.jsonl")
    marker = json.loads((run / "checkpoints/step_00000002/checkpoint.json").read_text())
    assert marker["format_version"] == 2

    _, said = ranks(1, "train", str(recipe), *(word for setting in SMALL for word in ("--set", setting)))

    assert "step_00000002 after step 2" in said
    for step, then in zip(read(run / "metrics.jsonl"), before, strict=True):
        for key in ("step", "loss", "grad_norm", "lr", "loss/a", "samples/a", "samples/b"):
            assert step[key] == pytest.approx(then[key], rel=1e-4), key
    assert sorted(p.name for p in (run / ".generations").glob("0*")) == ["00000001", "00000002"]
    assert not (run / ".leases").exists()
    written = json.loads((run / "checkpoints/step_00000004/checkpoint.json").read_text())
    assert written["format_version"] == 3
    assert written["lease"] == 2
    assert written["recipe"] == marker["identity"]
    assert written["state"]["samples"] == [21, 11]
