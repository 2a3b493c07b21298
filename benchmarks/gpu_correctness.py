"""Whether a GPU computes what a CPU computes, and again what it computed before.

    python benchmarks/gpu_correctness.py [--parallel 4] [--tiny]

Trains a small tokenizer for a few steps in a process of its own each: on the CPU with ddp in fp32, and on the GPU with
every strategy, in fp32 and in bf16 (with --tiny: four of them, in fp32); losses and gradient norms stand beside the
CPU's. Checkpoints are written in the background. Then the last one is taken away and the run goes on from the one
before, with deterministic kernels: its losses and the exported model must be the same bit by bit. Exit code 1 where
something is not. Without a GPU the same runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from _beside import beside
from _toy import make
from rich.console import Console
from rich.table import Table

from stamo_dist.device import Device

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
TINY = ("ddp", "zero2", "zero3", "fsdp")
#: Greatest relative difference of a loss from the CPU's in fp32; the weights that it is computed from differ, too.
TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2}
STAMO = "import torch; torch.use_deterministic_algorithms(True, warn_only=True); from stamo_dist import cli; cli.main()"
_LIMIT = 240  # seconds of a training


@dataclass
class Run:
    """One training."""

    recipe: Path
    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    on_gpu: bool = True

    @property
    def folder(self) -> Path:
        return self.recipe.parent / self.name

    def train(self) -> str | None:
        """Start or go on; what went wrong, if anything."""
        settings = {"run_dir": self.folder, **self.settings}
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        hidden = {} if self.on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
        try:
            done = subprocess.run(
                [sys.executable, "-c", STAMO, "train", str(self.recipe), *words], capture_output=True, text=True,
                env={**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1", **hidden},
                timeout=_LIMIT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"took more than {_LIMIT} s"
        if done.returncode == 0:
            return None
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-3:]
        return f"exit code {done.returncode}: {' | '.join(last)}"

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Loss and norm of each step."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]

    def model(self) -> dict[str, bytes]:
        """The exported weights by file."""
        files = sorted((self.folder / "model").rglob("*.safetensors"))
        return {str(file.relative_to(self.folder)): file.read_bytes() for file in files}


def farthest(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> tuple[float, float]:
    """Greatest relative difference of a loss, and of a gradient's norm."""
    pairs = list(zip(found, expected, strict=True))
    return tuple(max(abs(a[i] / b[i] - 1) for a, b in pairs) for i in (0, 1))  # type: ignore[return-value]


def losses(runs: list[Run], problems: dict[str, str | None], reference: Run) -> bool:
    """Print how far each run is from the CPU's; whether all are near enough."""
    table, good = Table(title=f"{Device.current().name} beside the CPU, ddp, fp32"), True
    for column in ("run", "loss, first", "last", "largest difference", "of the norm", "allowed", ""):
        table.add_column(column, justify="left" if column in ("run", "") else "right")
    expected = reference.curve
    table.add_row("CPU", f"{expected[0][0]:.6f}", f"{expected[-1][0]:.6f}")
    for run in runs:
        if (problem := problems[run.name]) is not None:
            table.add_row(run.name, *[""] * 5, f"failed: {problem}")
            good = False
            continue
        allowed, curve = TOLERANCE[str(run.settings["train.precision"])], run.curve
        loss, norm = farthest(curve, expected)
        near = loss <= allowed
        good &= near
        cells = (f"{curve[0][0]:.6f}", f"{curve[-1][0]:.6f}", f"{loss:.1e}", f"{norm:.1e}", f"{allowed:.0e}")
        table.add_row(run.name, *cells, "" if near else "too far")
        beside(f"{run.name}: loss differs from the CPU's", loss, allowed, "of it", other="allowed")
    Console(width=140).print(table)
    return good


def resumed(run: Run) -> bool:
    """Go on from the checkpoint in the middle, which was written in the background; whether all is as it was."""
    before, model = run.curve, run.model()
    newest = max((run.folder / "checkpoints").glob("step_*"))
    shutil.rmtree(newest)
    problem = run.train()
    if problem is None:
        same = {"the losses": run.curve == before, "the exported model": run.model() == model}
        problem = " and ".join(name for name, equal in same.items() if not equal)
        problem = problem and f"{problem} differ"
    print(f"» {run.name}, gone on from a checkpoint of the background: {problem or 'the same bit by bit'}", flush=True)
    return not problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--tiny", action="store_true", help="four strategies, no bf16, and one run that goes on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = make(Path(folder), **({} if options.tiny else {"size": 64, "head": 64}))
        reference = Run(recipe, "cpu", {"strategy.name": "ddp", "train.precision": "fp32"}, on_gpu=False)
        runs = [
            Run(recipe, f"{name} {precision}", {"strategy.name": name, "train.precision": precision})
            for precision in (("fp32",) if options.tiny else ("fp32", "bf16"))
            for name in (TINY if options.tiny else STRATEGIES)
        ]
        with ThreadPoolExecutor(options.parallel) as pool:
            everything = [reference, *runs]
            problems = dict(zip((run.name for run in everything), pool.map(Run.train, everything), strict=True))
            if problems["cpu"] is not None:
                sys.exit(f"the CPU's run: {problems['cpu']}")
            good = losses(runs, problems, reference)
            again = [run for run in runs if run.name.split()[0] in ("fsdp", "ddp", "zero2") and not problems[run.name]]
            good &= all(pool.map(resumed, again[:1] if options.tiny else again))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
