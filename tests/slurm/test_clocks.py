"""A real cluster whose nodes' clocks jump by an hour while a run trains there."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from test_interrupted import SLOW

from stamo_dist.launch.record import main_log


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler (Debian: gcc)")
def test_clocks_jump(submit, cluster, preempt, stamo_there, tmp_path):
    """2 nodes: one goes an hour ahead while it trains, the other an hour back, both while it waits for its turn."""
    library, clocks = tmp_path / "clock.so", tmp_path / "clocks"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    clocks.mkdir()

    def jump(node: str, hours: int) -> None:
        with (clocks / node).open("r+b" if (clocks / node).exists() else "wb") as file:  # in place: it is mapped
            file.write(struct.pack("@l", hours * 3600))

    first, second, third = cluster.names
    for node in (first, second):
        jump(node, 0)
    environment = {"OMP_NUM_THREADS": 1, "LD_PRELOAD": str(library), "CLOCKS": str(clocks)}
    profile = {
        "partition": "low", "nodes": 2, "processes_per_node": 1, "environment": environment, "exclude": third,
    }  # fmt: skip
    run = submit("run", profile, "train.steps=60", "train.micro_batch=8", "train.checkpoint.every=10")
    run.release(SLOW)

    def trains(count: int, steps: int) -> None:
        run.starts(count, steps=steps)
        [seen] = json.loads(stamo_there("status", run.folder, "--json"))
        assert seen["state"] in ("starting", "running"), seen

    trains(1, 3)
    jump(second, 1)
    trains(1, 12)
    jump(first, -1)
    trains(1, 24)
    preempt()
    trains(2, 3)
    jump(first, 1)
    jump(second, -1)
    trains(2, 12)
    run.ends("finished")
    assert run.story == ["submitted", "started", "preempted", "requeued", "started", "exporting", "finished"]
    _, began, left, _, again, *_ = run.events
    assert left.time < began.time, "no clock has jumped"
    assert left.step == again.step, "it saved"
    log = main_log(run.folder).read_text()
    assert not re.search(r"saved .* in (-|\d{3})", log)
    assert all(0 < m["samples_per_second"] < 1000 for m in run.metrics())
    run.assert_as_uninterrupted(processes=2)
