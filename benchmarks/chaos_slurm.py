"""`stamo chaos --slurm` on a Slurm cluster of its own on this machine, whose operator it is.

Starts the cluster (root, Debian's slurm-wlm and munge) and a file system in memory for the runs, trains the toy recipe
of the tests in jobs on 2 nodes, undisturbed and under faults of all kinds, and prints what came of it. Another call
with the same DIR adds to its results.

python benchmarks/chaos_slurm.py DIR [--kills N] [--seed S] [--strategies A,B] [--set A.B=C]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from cluster import Cluster, missing  # noqa: E402
from cluster_operator import ClusterOperator, small_disk  # noqa: E402
from rich.console import Console  # noqa: E402
from toy import make_source, make_vae, write_recipe  # noqa: E402

from stamo_dist.chaos import results  # noqa: E402
from stamo_dist.chaos.harness import Plan  # noqa: E402
from stamo_dist.chaos.job_harness import JobHarness, Site  # noqa: E402

PROFILE = {
    "partition": "low", "nodes": 2, "processes_per_node": 1, "time": "04:00:00", "environment": {"OMP_NUM_THREADS": 1},
    "setup": ["ulimit -c 0"], "srun": ["--propagate=CORE"],  # SIGSEGV would leave half a gigabyte here
}  # fmt: skip
SETTINGS = (
    "train.steps=600", "train.micro_batch=4", "train.checkpoint.every=10", "train.step_timeout=15",
    "train.setup_timeout=60", "train.save_timeout=15", "data.augment.brightness=0",
)  # fmt: skip


def main(asked: argparse.Namespace) -> int:
    if why := missing():
        sys.exit(f"no cluster: {why}")
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, small_disk(asked.folder / "disk", "2g"):
        cluster = Cluster(Path(scratch) / "cluster")
        out = asked.folder / "disk" / "chaos"
        out.mkdir()
        if (kept := asked.folder / results.FILE).exists():
            shutil.copy(kept, out)
        try:
            cluster.start()
            os.environ.update(cluster.env, XDG_STATE_HOME=str(Path(scratch) / "state"))
            disturb(asked, cluster, Path(scratch), out)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        finally:
            cluster.stop()
            keep(out, asked.folder)
    found = results.read(asked.folder)
    results.show(found, Console(width=140))
    return 0 if all(result.good for result in found) else 1


def disturb(asked: argparse.Namespace, cluster: Cluster, scratch: Path, out: Path) -> None:
    make_source(scratch, "a")
    make_source(scratch, "b")
    recipe = write_recipe(scratch / "toy.yaml", scratch, make_vae(scratch / "vae"))
    profile = scratch / "profile.yaml"
    profile.write_text(json.dumps(PROFILE))
    site = Site(str(profile), ClusterOperator(cluster))
    plan = Plan(
        recipe=recipe, overrides=[*SETTINGS, *asked.set], kills=asked.kills, seed=asked.seed,
        strategies=asked.strategies.split(","), sizes=[site.processes()], out=out, untouched=1, convert=False,
        patience=180,
    )  # fmt: skip
    JobHarness(plan, site, lambda text: print(text, flush=True)).run()


def keep(out: Path, folder: Path) -> None:
    """Move results and runs off the file system in memory."""
    if (out / results.FILE).exists():
        shutil.copy(out / results.FILE, folder)
    for run in out.iterdir():
        if run.is_dir() and not run.name.startswith("untouched"):
            kept = next(p for n in range(10_000) if not (p := folder / f"{run.name}.{n}").exists())
            shutil.copytree(run, kept, ignore=shutil.ignore_patterns("code", "state"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=lambda text: Path(text).absolute())
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", default="ddp")
    parser.add_argument("--set", action="append", default=[])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(parser.parse_args()))
