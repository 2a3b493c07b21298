"""What `train.virtual_workers` costs: seconds of a step under ddp with and without it, in turns.

python benchmarks/virtual.py recipes/tokenizer_demo.yaml [--nproc 2] [--workers 4] [--steps 40] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table


def step_seconds(options: argparse.Namespace, run: Path, *settings: str) -> float:
    """Median over the second half of a run."""
    settings = (
        *settings, "strategy.name=ddp", f"run_dir={run}", f"train.steps={options.steps}", "train.log_every=1",
        "train.checkpoint.every=1000000", *options.set,
    )  # fmt: skip
    command = [sys.executable, "-m", "stamo_dist.cli", "train", options.recipe, "--nproc", str(options.nproc)]
    command += [x for setting in settings for x in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [after["seconds"] - before["seconds"] for before, after in pairwise(lines)]
    return statistics.median(times[len(times) // 2 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    options = parser.parse_args()
    cases = {"ddp": (), f"{options.workers} virtual workers": (f"train.virtual_workers={options.workers}",)}
    found: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="stamo-benchmark-") as folder:
        for turn in track(range(options.turns), "training", console=Console(stderr=True)):
            for i, (name, settings) in enumerate(cases.items()):
                found[name].append(step_seconds(options, Path(folder) / f"{turn}-{i}", *settings))
    table = Table(title=f"{options.recipe}, {options.nproc} processes; medians of {options.turns} turns")
    for column in ("", "step", "of ddp"):
        table.add_column(column, justify="right" if column else "left")
    base = found["ddp"]
    for name, times in found.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        table.add_row(name, f"{statistics.median(times) * 1e3:.0f} ms", f"×{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
