"""Seconds that a preemption costs: signal → saved → left → queued again → started → first step.

Starts a Slurm cluster of its own on this machine (root, Debian's slurm-wlm and munge), asks a toy run on 2 nodes to
stop CYCLES times, and prints the split beside the floor: an empty job that `scontrol requeue` starts again.

python benchmarks/slurm_cycle.py [CYCLES]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from cluster import Cluster, missing  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from toy import make_source, make_vae, write_recipe  # noqa: E402

from stamo_dist.launch.record import Event, events, read  # noqa: E402

PARTS = ("signal → saved", "saved → left", "left → queued again", "queued again → started", "started → first step")


def main(cycles: int) -> None:
    if why := missing():
        sys.exit(f"no cluster: {why}")
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder) / "cluster")
        try:
            cluster.start()
            floor = [empty(cluster, Path(folder)) for _ in range(cycles)]
            rows = run(cluster, Path(folder), cycles)
        finally:
            cluster.stop()
    table = Table("", "median s", "all")
    for part, values in zip(PARTS, zip(*rows, strict=True), strict=True):
        table.add_row(part, f"{statistics.median(values):.2f}", " ".join(f"{v:.2f}" for v in values))
    whole = [sum(row) for row in rows]
    table.add_row("in all", f"{statistics.median(whole):.2f}", " ".join(f"{v:.2f}" for v in whole))
    share = statistics.median(floor) / statistics.median(whole)
    table.add_row(
        "floor: an empty job, queued again → started", f"{statistics.median(floor):.2f}", f"{share:.0%} of all of it"
    )
    Console().print(table)


def run(cluster: Cluster, folder: Path, cycles: int) -> list[list[float]]:
    """The seconds of each part, for each time that the run was asked to stop."""
    make_source(folder, "a")
    make_source(folder, "b")
    recipe = write_recipe(folder / "toy" / "toy.yaml", folder, make_vae(folder / "vae"))
    profile = folder / "profile.yaml"
    profile.write_text(json.dumps({
        "partition": "low", "nodes": 2, "processes_per_node": 1, "environment": {"OMP_NUM_THREADS": 1},
    }))  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "stamo_dist.cli", "submit", recipe, "--cluster", profile, "--set", "train.steps=1000000",
         "--set", "train.checkpoint.every=1000000"],
        env={**cluster.env, "XDG_STATE_HOME": folder}, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    path = folder / "toy" / "run"
    job = read(path).job
    assert job is not None
    rows = []
    first_step(cluster, path, 0, start=1)
    for cycle in track(range(1, cycles + 1), "asked to stop"):
        time.sleep(1)
        signal = time.time()
        cluster.run("scancel", "--signal=USR1", job)
        cluster.until(lambda cycle=cycle: len(starts(path)) == cycle + 1)
        began = starts(path)[-1]
        stepped = first_step(cluster, path, began.step or 0, start=cycle + 1)
        left, queued = [e for e in events(path) if e.event in ("preempted", "requeued")][-2:]
        saved = (path / "checkpoints" / f"step_{began.step:08d}" / "checkpoint.json").stat().st_mtime
        moments = [signal, saved, when(left), when(queued), when(began), stepped]
        rows.append([b - a for a, b in itertools.pairwise(moments)])
    cluster.run("scancel", job)
    cluster.until(lambda: cluster.state(job) == "CANCELLED")
    return rows


def starts(path: Path) -> list[Event]:
    return [e for e in events(path) if e.event == "started"]


def when(event: Event) -> float:
    return datetime.fromisoformat(event.time).timestamp()


def first_step(cluster: Cluster, path: Path, after: int, *, start: int) -> float:
    """When the first step after `after` of this start was logged."""
    metrics = path / "metrics.jsonl"
    cluster.until(lambda: len(starts(path)) == start)

    def newest() -> int:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    cluster.until(lambda: newest() > after)
    return time.time()


def empty(cluster: Cluster, folder: Path) -> float:
    """Seconds that an empty job needs to be started again."""
    log = folder / f"empty-{time.time_ns()}"
    job = cluster.run(
        "sbatch", "--parsable", "-N2", "-c1", "--requeue", "--open-mode=append", "-o", os.devnull,
        "--wrap", f"date +%s.%N >> {log}; exec sleep 600",
    ).strip()  # fmt: skip
    cluster.until(log.exists)
    began = time.time()
    cluster.run("scontrol", "requeue", job)
    cluster.until(lambda: log.read_text().count("\n") == 2)
    started = float(log.read_text().split()[-1])
    cluster.run("scancel", job)
    cluster.until(lambda: cluster.state(job) == "CANCELLED")
    return started - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cycles", metavar="CYCLES", type=int, nargs="?", default=5)
    main(parser.parse_args().cycles)
