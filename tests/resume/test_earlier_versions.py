"""A run begun before files and fields were renamed goes on as if nothing had been."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from toy import make_source, make_vae, write_recipe

#: Steps 1 to 4 in metrics.jsonl, the checkpoint of step 2 and the first start's number, as commit c9db5ff wrote them.
RUN = Path(__file__).parent / "run_of_format_2.tar.xz"
#: fsdp/, zero2/ and zero3/, each on two processes with an average: the same of what commit 78f73f8 wrote.
RUNS_3 = Path(__file__).parent / "runs_of_format_3.tar.xz"
#: The same of ddp, fsdp, zero2 and zero3, as commit 21ba14e wrote them.
RUNS_4 = Path(__file__).parent / "runs_of_format_4.tar.xz"
SMALL = [
    "train.steps=4", "train.checkpoint.every=2", "model.compressor.width=16", "model.compressor.dim=16",
    "model.decoder.config={patch_size: 1, num_layers: 1, num_attention_heads: 1, attention_head_dim: 16}",
    "model.encoder.config={patch_size: 8, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
]  # fmt: skip


def read(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


SAME = ("step", "loss", "grad_norm", "lr", "loss/a", "samples/a", "samples/b")


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
        for key in SAME:
            assert step[key] == pytest.approx(then[key], rel=1e-4), key
    assert sorted(p.name for p in (run / ".generations").glob("0*")) == ["00000001", "00000002"]
    assert not (run / ".leases").exists()
    written = json.loads((run / "checkpoints/step_00000004/checkpoint.json").read_text())
    assert written["format_version"] == 5
    assert written["lease"] == 2
    assert written["recipe"] == marker["identity"]
    assert written["state"]["samples"] == [21, 11]


@pytest.mark.parametrize(
    ("version", "strategy"),
    [(3, "fsdp"), (3, "zero2"), (3, "zero3"), (4, "ddp"), (4, "fsdp"), (4, "zero2"), (4, "zero3")],
)
def test_a_run_of_checkpoint_format_3_and_4_goes_on(ranks, tmp_path, version, strategy) -> None:
    """As it would have gone on then; and what is written now goes on from itself to the bit."""
    for name in "ab":
        make_source(tmp_path / "shards", name)
    recipe = write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", make_vae(tmp_path / "vae"), strategy=strategy)
    run = tmp_path / "run"
    with tarfile.open(RUNS_3 if version == 3 else RUNS_4) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith(f"./{strategy}/")]
        archive.extractall(tmp_path, members, filter="data")
    (tmp_path / strategy).rename(run)
    then, marker = read(run / "metrics.jsonl"), run / "checkpoints/step_00000002/checkpoint.json"
    assert json.loads(marker.read_text())["format_version"] == version
    settings = [*SMALL, "train.ema=0.9", "train.checkpoint.every=1", "train.checkpoint.keep=9"]
    arguments = [2, "train", str(recipe), *(word for setting in settings for word in ("--set", setting))]

    _, said = ranks(*arguments)

    assert "step_00000002 after step 2" in said
    now, weights = read(run / "metrics.jsonl"), run / "model/transformer/diffusion_pytorch_model.safetensors"
    for step, before in zip(now, then, strict=True):
        for key in SAME:
            assert step[key] == pytest.approx(before[key], rel=1e-4), key
    exported = weights.read_bytes()
    shutil.rmtree(run / "checkpoints/step_00000004")
    assert "step_00000003 after step 3" in ranks(*arguments)[1]
    assert [[s[k] for k in SAME] for s in read(run / "metrics.jsonl")] == [[s[k] for k in SAME] for s in now]
    assert weights.read_bytes() == exported
