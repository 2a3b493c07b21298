"""Whole runs on a fake GPU, whose copies arrive late: every line that only a GPU runs, and the numbers of a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy import write_recipe
from warm import Warm

from stamo_dist.distributed.rank import reserve_port
from stamo_dist.report import write_report

PROGRAM = Path(__file__).resolve().parent.parent / "on_fake_gpu.py"
STEPS = 6
SETTINGS = [
    f"train.steps={STEPS}", "train.precision=bf16", "train.checkpoint={every: 3, background: true}", "train.ema=0.9",
    "train.profile={start: 2, steps: 2, memory: true}", "train.sync_guard=warn",
]  # fmt: skip
WORDS = [word for setting in SETTINGS for word in ("--set", setting)]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_a_run_on_a_gpu_is_one_on_a_cpu(toy, warm: Warm, tmp_path: Path, strategy: str) -> None:
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae, strategy=strategy)
    common = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port()),
    }  # fmt: skip
    ranks = [
        warm.start(
            tmp_path / "counts", "train", recipe, *WORDS, program=PROGRAM,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        codes = [process.wait(240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = ranks[0].stdout.read_text()
    assert codes == [0, 0], said
    assert f"{strategy} bf16 on 2 × NVIDIA H100 80GB HBM3" in said
    warm.run("train", recipe, *WORDS, "--set", f"run_dir={tmp_path}/cpu", "--nproc", "2")
    found, expected = metrics(tmp_path / "run"), metrics(tmp_path / "cpu")
    for key in ("loss", "grad_norm"):
        assert [m[key] for m in found] == pytest.approx([m[key] for m in expected], rel=1e-3)
    for line in found:
        assert (line["peak_gb"], line["reserved_gb"]) == (3.0, 4.0)
        assert 0 <= line["comm_wait"] < 1
        assert "mfu" in line
    assert all("comm_wait" in line and "mfu" not in line for line in expected)
    for rank in range(2):
        counts = json.loads((tmp_path / f"counts.{rank}").read_text())
        assert counts["wait_event"] == STEPS, "each batch came on a stream of its own"
        # From the second step on: the guard, the wait for the norm that is meant, the guard again; not between steps.
        assert counts["modes"] == ["default", "default", *["warn", "default", 1, "default"] * (STEPS - 1)]
        assert counts.get("memory on", 0) == counts.get("memory off", 0) == (1 if rank == 0 else 0)
        assert counts["selected"] == [0], "the thread that sends batches"
        # At the end, for each part of the save in background, and for the trace: no step waits for the device.
        assert counts["synchronize"] <= 4 + (rank == 0) < STEPS
    trace = tmp_path / "run/profile/memory_00000003.pickle"
    assert trace.read_bytes() == b"snapshot"
    page = write_report([tmp_path / "run"], tmp_path / "else where" / "page.html").read_text()
    for name in ("step_00000003.json.gz", trace.name):
        assert f'href="../run/profile/{name}"' in page
    assert "waiting for other ranks, mean of the run" in page
    assert "samples/s, median of the run" in page
    assert "3 GB at most" in page
