"""What `stamo submit` finds before anything is queued."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster import Cluster
from toy import RECIPE, write_recipe

ROOT = Path(__file__).resolve().parents[2]
_NO_TORCH = """\
import sys
from stamo_dist.cli import main
try:
    main()
finally:
    print([name for name in ("torch", "numpy", "streaming") if name in sys.modules], file=sys.stderr)
"""


def profile(folder: Path, **fields: object) -> Path:
    file = folder / "profile.yaml"
    file.write_text(yaml.safe_dump({"partition": "low", "processes_per_node": 2, "time": "00:10:00", **fields}))
    return file


def test_dry_run_needs_neither_torch_nor_slurm(toy, tmp_path):
    """It answers at once, prints the script to the letter, and leaves nothing behind."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    cluster = profile(
        tmp_path, nodes=4, min_nodes=1, gpus_per_node=2, processes_per_node=None, cpus_per_gpu=6, memory="100G",
        account="robots", setup=["module load cuda", "source 'my env/bin/activate'"],
        environment={"NCCL_DEBUG": "WARN", "NOTE": "it's $HOME"}, sbatch={"reservation": "r"},
        container={"image": "/images/my stamo.sqsh", "mounts": ["/data:/data", "/runs dir:/runs"]}, srun=["--mpi=none"],
    )  # fmt: skip
    words = ["submit", str(recipe), "--cluster", str(cluster), "--time", "02:00:00", "--dry-run"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _NO_TORCH, *words], check=False, capture_output=True, text=True, cwd=ROOT, timeout=180,
        env={**env, "PATH": str(tmp_path)},
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert seconds < 5  # about 0.5 where nothing else runs
    lines = done.stdout.splitlines()
    for option in (
        "--nodes=1-4", "--gpus-per-node=2", "--cpus-per-task=12", "--mem=100G", "--account=robots", "--time=02:00:00",
        "--signal=USR1@180", "--requeue", "--reservation=r", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {option}" in lines
    assert "export NCCL_DEBUG=WARN" in lines
    assert "export NOTE='it'\"'\"'s $HOME'" in lines
    assert lines[lines.index("module load cuda") + 1] == "source 'my env/bin/activate'"
    srun = shlex.split(next(line for line in lines if line.startswith("#   srun")), comments=False)[1:]
    assert {"--nodes=4", "--ntasks=8", "--ntasks-per-node=2", "--mpi=none"} < {*srun}
    assert "--container-image=/images/my stamo.sqsh" in srun
    [mounts] = [word.removeprefix("--container-mounts=") for word in srun if word.startswith("--container-mounts=")]
    run = tmp_path / "run"
    assert {"/data:/data", "/runs dir:/runs", f"{run}:{run}", f"{ROOT}:{ROOT}"} == {*mounts.split(",")}
    assert srun[-3:-1] == ["stamo_dist.launch.rank", "train"]
    assert not any(line.startswith("#SBATCH") and "ntasks" in line for line in lines)
    assert "with 3 nodes it uses 2 of them: 6 processes do not divide train.global_batch 8" in done.stdout
    assert not (tmp_path / "run").exists()


def test_problems_of_a_profile_come_at_once_with_their_lines(toy, stamo, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    file = tmp_path / "profile.yaml"
    file.write_text("partition: low\nnods: 2\ngpus_per_node: many\nsbatch: {signal: USR2@1}\n")
    done = stamo("submit", recipe, "--cluster", file, check=False)
    assert done.returncode == 2
    assert f"{file}:2: nods: no such field; did you mean nodes?" in done.stderr
    assert f"{file}:3: gpus_per_node: must be a whole number at least 0, not many" in done.stderr
    assert "sbatch: signal is decided by the profile's fields or the launcher" in done.stderr
    done = stamo("submit", recipe, "--cluster", "preemptable", check=False)
    assert done.returncode == 2
    assert "did you mean preemptible?" in done.stderr


@pytest.mark.parametrize(
    ("fields", "settings", "words"),
    [
        ({"partition": "hihg"}, [], "partition: the cluster has none called hihg; did you mean high?"),
        (
            {"partition": "small", "nodes": 2},
            [],
            "nodes: at least 2 are asked for, and partition small gives at most 1",
        ),
        ({"partition": "small", "time": "01:00:00"}, [], "time: 01:00:00 is more than partition small allows"),
        ({"partition": "staff", "account": "guest"}, [], "account: partition staff does not take guest; it takes only"),
        ({"cpus_per_gpu": 64}, [], "no node has that many GPUs, CPUs or that much memory"),
        ({"constraint": "h100"}, [], "the profile's constraint h100 names no feature of a node"),
        ({"nodes": 3}, [], "8 is not divisible by 6 processes"),
        ({}, ["data.sources.b.path=/nowhere/b"], "data.sources.b: /nowhere/b: no such folder"),
        ({}, ["model.vae.weights=/nowhere/vae"], "model.vae.weights: there is no folder /nowhere/vae"),
        ({}, ["run_dir=/proc/run"], "run_dir: /proc/run"),
        ({}, ["train.stepss=3"], "train.stepss: no such field"),
    ],
)
def test_refused_before_it_is_queued(cluster: Cluster, toy, tmp_path, fields, settings, words):
    """Exit code 2, the field and what is wrong with it, nothing queued, nothing left behind."""
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        RECIPE.format(run=tmp_path / "runs" / "toy", shards=toy.shards, vae=toy.vae, strategy="ddp", workers=0)
    )
    before = cluster.run("squeue", "-h", "-t", "all", "-o", "%i")
    done = subprocess.run(
        [sys.executable, "-m", "stamo_dist.cli", "submit", str(recipe), "--cluster", str(profile(tmp_path, **fields)),
         *(w for s in settings for w in ("--set", s))],
        check=False, capture_output=True, text=True, cwd=ROOT, timeout=180, env=cluster.env,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert cluster.run("squeue", "-h", "-t", "all", "-o", "%i") == before
    assert not (tmp_path / "runs").exists()
