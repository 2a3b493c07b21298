"""What the length of a run's history costs: resuming, `stamo status` and `stamo report`, in fresh processes.

python benchmarks/history.py [--steps 1e6] [--sources 50] [--after 500] [--repeats 3] [--folder /tmp]

Writes a run folder whose metrics.jsonl has a line a step. To resume is to cut off the `--after` steps since the
checkpoint. The limit is to read these from the end of the file; `wc -l` reads all of it. Before each measurement the
file is taken out of the page cache. Imports are not counted in the seconds; the peak of memory has them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

BLOCK = 1000  # lines written at once
RECIPE = """\
name: history
run_dir: {run}
data:
  image_size: 32
  sources: {{{sources}}}
train: {{steps: {steps}, global_batch: 512}}
"""
#: What a fresh process does: imports, then the call.
PARTS = {
    "resume": (
        "from stamo_dist.tracking.metrics_file import MetricsFile",
        "MetricsFile(run / 'metrics.jsonl', int(sys.argv[2]))",
    ),
    "status": ("from stamo_dist.launch.run_progress import read_progress", "read_progress(run)"),
    "report": ("from stamo_dist.report import write_report", "write_report([run])"),
    "the end alone": (
        "import os",
        "f = open(run / 'metrics.jsonl', 'rb'); f.seek(-int(sys.argv[3]), 2); f.read()",
    ),
    "wc -l": ("import subprocess", "subprocess.run(['wc', '-l', run / 'metrics.jsonl'], stdout=subprocess.DEVNULL)"),
}
CHILD = """\
import json, sys, time
from pathlib import Path
{imports}
def memory(what):
    return next(int(l.split()[1]) / 1e3 for l in open('/proc/self/status') if l.startswith(what))
run, before, began = Path(sys.argv[1]), memory('VmRSS'), time.perf_counter()
{call}
print(json.dumps([time.perf_counter() - began, memory('VmHWM'), memory('VmHWM') - before]))
"""


def write(run: Path, steps: int, sources: int) -> None:
    (run / "resolved.yaml").write_text(
        RECIPE.format(
            run=run, steps=steps, sources=", ".join(f"source{i}: {{path: /none/{i}}}" for i in range(sources))
        )
    )
    rest = {"loss": 0.123456789, "world_mse": 0.0123456789, "motion": 0.0123456789, "grad_norm": 0.98765, "lr": 1e-4}
    rest |= {"samples_per_second": 4096.123, "data_wait": 0.0123, "seconds": 123456.789}
    for term in ("loss", "world_mse", "motion"):
        rest |= {f"{term}/robot_data_source_{i:02d}": 0.12345678901234567 / (i + 1) for i in range(sources)}
    rest |= {f"samples/robot_data_source_{i:02d}": 81 for i in range(sources)}
    end = json.dumps(rest)[1:].encode() + b"\n"
    with (run / "metrics.jsonl").open("wb") as f:
        for first in range(1, steps + 1, BLOCK):
            f.write(b"".join(b'{"step": %d, ' % step + end for step in range(first, min(first + BLOCK, steps + 1))))
        f.flush()
        os.fsync(f.fileno())


def measure(part: str, run: Path, step: int, end: int) -> list[float]:
    """Seconds, MB at most, and of these MB more than after the imports."""
    with (run / "metrics.jsonl").open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    imports, call = PARTS[part]
    code = CHILD.format(imports=imports, call=call)
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), str(step), str(end)], check=True, capture_output=True, text=True
    )
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=float, default=1e6)
    parser.add_argument("--sources", type=int, default=50)
    parser.add_argument("--after", type=int, default=500, help="Steps since the checkpoint.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="Where there is room: 8 kB a step of 50 sources.")
    options = parser.parse_args()
    steps = int(options.steps)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = Path(folder)
        began = time.perf_counter()
        write(run, steps, options.sources)
        size = (run / "metrics.jsonl").stat().st_size
        print(f"{size / 1e9:.2f} GB, {size / steps:,.0f} bytes a line, written in {time.perf_counter() - began:.0f} s")
        found: dict[str, list[list[float]]] = {part: [] for part in PARTS}
        for turn in range(options.repeats):
            for part, rows in found.items():
                step = steps - (turn + 1) * options.after
                rows.append(measure(part, run, step, options.after * size // steps))
    table = Table("", "seconds", "peak MB", "of these above the imports", title=f"{steps:,} steps; medians")
    for part, rows in found.items():
        table.add_row(part, *(f"{statistics.median(row[i] for row in rows):.{3 * (i == 0)}f}" for i in range(3)))
    Console().print(table)


if __name__ == "__main__":
    main()
