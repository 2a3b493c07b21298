"""Seconds of `stamo status` for 10, 100 and 500 runs, beside reading the same files alone and, with --slurm, `squeue`.

python benchmarks/status.py [--runs 1,10,100,500] [--slurm] [--repeat 5]

Makes run folders as trainings leave them: the demonstration's resolved recipe, 500 logged steps of 20 values, a launch
that was queued again three times, five checkpoints, a heartbeat. `read` opens and reads every file of theirs that
status looks at, in one thread, and is the floor of any command that looks at folders. CPU: what `stamo status` took of
the processor, which a busy machine does not lengthen. --slurm starts a Slurm cluster of its own on this machine
(root, Debian's slurm-wlm and munge), in which each run is a held job, and times `squeue` on it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "slurm")]

from cluster import Cluster, missing  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from stamo_dist.launch.record import Event, Launch, main_log, record  # noqa: E402
from stamo_dist.recipe.load import load  # noqa: E402
from stamo_dist.recipe.render import render  # noqa: E402
from stamo_dist.run.lease import FOLDER, Owner  # noqa: E402

STEPS, STARTS = 500, 4
VALUES = [f"value_{i}" for i in range(16)]


def main(counts: list[int], repeat: int, slurm: bool) -> None:
    if slurm and (why := missing()):
        sys.exit(f"no cluster: {why}")
    table = Table("runs", "stamo status", "CPU", "--json", "read", *(["squeue"] if slurm else []))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        env = dict(os.environ)
        jobs: list[str] = []
        if slurm:
            cluster = Cluster(folder / "cluster")
            stack.callback(cluster.stop)
            cluster.start()
            wish = ["sbatch", "--parsable", "--hold", f"--array=0-{max(counts) - 1}", "--wrap", "true"]
            array, env = cluster.run(*wish).strip(), cluster.env
            jobs = [f"{array}_{i}" for i in range(max(counts))]
        text = "".join(f"{line.plain}\n" for line in render(load(ROOT / "recipes" / "tokenizer_demo.yaml")))
        for count in counts:
            os.environ["XDG_STATE_HOME"] = env["XDG_STATE_HOME"] = str(folder / f"state{count}")
            runs = [
                make_run(folder / f"of{count}" / f"run{i:03}", text, jobs[i] if jobs else None) for i in range(count)
            ]
            table.add_row(str(count), *times(runs, env, repeat, slurm))
    Console().print(table)


def times(runs: list[Path], env: Mapping[str, str], repeat: int, slurm: bool) -> list[str]:
    """The row of a table."""

    def command(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run(words, env=env, check=True, capture_output=True, cwd=runs[0].parents[1])

    stamo = (sys.executable, "-m", "stamo_dist.cli", "status")
    squeue = ("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%S|%N|%D|%M|%l|%P|%u|%j")
    measured: list[Callable[[], object]] = [command(*stamo), command(*stamo, "--json"), lambda: read(runs)]
    measured += [command(*squeue)] if slurm else []
    measured[0]()  # compiles what has not been imported yet
    rounds = [[timed(what) for what in measured] for _ in range(repeat)]
    wall = [statistics.median(t for t, _ in values) for values in zip(*rounds, strict=True)]
    cpu = statistics.median(seconds for _, seconds in next(zip(*rounds, strict=True)))
    return [f"{seconds:.3g} s" for seconds in (wall[0], cpu, *wall[1:])]


def timed(what: Callable[[], object]) -> tuple[float, float]:
    """(seconds, seconds of the processor that the processes which it started took)."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    what()
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read(runs: list[Path]) -> int:
    """Read every file that status looks at."""
    size = 0
    for run in runs:
        for path in (run, run / "checkpoints", run / FOLDER, run / "logs"):
            os.listdir(path)
        names = ("launch/launch.json", "launch/events.jsonl", "resolved.yaml", f"{FOLDER}/00000004", "logs/main.log")
        for name in names:
            size += len((run / name).read_bytes())
        with (run / "metrics.jsonl").open("rb") as f:
            f.seek(-min(1 << 15, f.seek(0, os.SEEK_END)), os.SEEK_END)
            size += len(f.read())
    return size


def make_run(run: Path, recipe: str, job: str | None) -> Path:
    """A run that trains, or, with a job, waits to go on."""
    launch = Launch(run.name, str(run), "recipes/tokenizer_demo.yaml", command=["train", "recipe.yaml"])
    launch = replace(launch, cluster="gpu", nodes=2, processes_per_node=8, job_ids=[job or "local-1"])
    launch.write()
    record(run, Event("submitted"))
    for i in range(STARTS):
        step = i * STEPS // STARTS
        record(run, Event("started", launch.job, i, ["n1", "n2"], 16, step))
        record(run, Event("preempted", launch.job, i, step=step + 100, reason="it left to be started again"))
        record(run, Event("requeued", launch.job, i, step=step + 100, reason="it left to be started again"))
    (run / "resolved.yaml").write_text(recipe)
    rows = [{"step": i, "loss": 1 / i, **dict.fromkeys(VALUES, 0.123456), "samples_per_second": 100.0, "seconds": i / 2}
            for i in range(1, STEPS + 1)]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(1, 6):
        place = run / "checkpoints" / f"step_{100 * i:08}"
        place.mkdir(parents=True)
        (place / "checkpoint.json").write_text("{}")
    (run / FOLDER).mkdir()
    (run / FOLDER / "00000004").write_text(json.dumps(asdict(replace(Owner.this(), boot="another", node="n1"))))
    main_log(run).parent.mkdir()
    main_log(run).write_text("--- start 1\n" * 100)
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="1,10,100,500", metavar="N,N,…")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--slurm", action="store_true")
    given = parser.parse_args()
    main([int(n) for n in given.runs.split(",")], given.repeat, given.slurm)
