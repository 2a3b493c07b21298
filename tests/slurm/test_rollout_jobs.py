"""A policy that trains in a job is rolled out in jobs of their own, which outlive it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from cluster import Cluster
from point_world import as_simulators
from toy_policy import write_policy_recipe

from stamo_dist.launch.record import events, read
from stamo_dist.run.success import Successes

ROOT = Path(__file__).resolve().parents[2]
ROLLOUT = """
evaluate:
  every: 4
  rollout: {benchmark: toy, tasks: [suite/one], trials: 4, size: 32, max_steps: 2, processes: 1, where: slurm}
"""


def test_a_job_of_its_own(cluster: Cluster, toy_policy: Path, tmp_path: Path) -> None:
    recipe, run, site = tmp_path / "toy.yaml", tmp_path / "run", tmp_path / "site"
    write_policy_recipe(recipe, toy_policy)
    recipe.write_text(recipe.read_text() + ROLLOUT)
    site.mkdir()
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"cpus_per_gpu": 1, "time": "00:10:00", "environment": {"OMP_NUM_THREADS": 1}}))
    settings = [w for s in ("train.steps=4", "train.checkpoint.every=4") for w in ("--set", s)]
    done = subprocess.run(
        [sys.executable, "-m", "stamo_dist.cli", "submit", str(recipe), "--cluster", str(profile), *settings],
        check=False, capture_output=True, text=True, timeout=180, cwd=ROOT,
        env={**cluster.env, "XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONPATH": as_simulators(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    log, here = run / "logs/main.log", run / "eval/during/step_00000004"

    def said() -> str:
        logs = [path.read_text() for path in (log, here / "logs/main.log") if path.exists()]
        return "\n".join([*logs, *map(str, events(run)), *map(str, events(here))])

    cluster.until(lambda: events(run)[-1].event in ("finished", "failed"), 600, said)
    job = read(here).job
    assert f"step 4 is rolled out by job {job}, which goes on" in log.read_text()
    assert job != read(run).job
    cluster.until(lambda: events(here)[-1].event in ("finished", "failed"), 600, said)
    last = Successes.read(run).last
    assert last is not None, said()
    assert (last.step, last.success, last.trials) == (4, 50, 4)
    assert read(here).snapshot == read(run).snapshot
