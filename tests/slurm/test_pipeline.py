"""Pipelines and sweeps: arrays and chains of real jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from raw import write_raw
from toy import RECIPE as TOKENIZER
from toy import write_recipe
from toy_policy import RECIPE as POLICY

from stamo_dist.launch.record import events, read

ROOT = Path(__file__).resolve().parents[2]
PROFILE = {"cpus_per_gpu": 1, "time": "00:10:00", "signal_delay": 30, "environment": {"OMP_NUM_THREADS": 1}}


@pytest.fixture
def here(cluster: Cluster, tmp_path: Path) -> Callable[..., str]:
    """The `stamo` command on the cluster's login node."""
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(PROFILE))
    env = {**cluster.env, "XDG_STATE_HOME": str(tmp_path / "state")}

    def stamo(*words: object) -> str:
        command = [sys.executable, "-m", "stamo_dist.cli", *map(str, words)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=180, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return stamo


def story(run: Path) -> list[str]:
    return [e.event for e in events(run)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def training(tmp_path: Path, out: Path, vae: Path) -> dict[str, Any]:
    """Stages from statistics to a policy: latents on two nodes, the tokenizer that reads them, and what it is for."""
    tokenizer = yaml.safe_load(
        TOKENIZER.format(run=tmp_path / "tokenizer", shards=out, vae=vae, strategy="ddp", workers=0)
    )
    tokenizer["data"] |= {"sources": {"can": {"path": str(out)}}, "latents": "cached", "augment": {}}
    policy = yaml.safe_load(
        POLICY.format(run=tmp_path / "policy", root=tmp_path, strategy="fsdp", actions="tokens", proprio="true")
    )
    policy["data"]["sources"] = {"can": {"path": str(out), "instruction": "move the can"}}
    for name, recipe in (("tokenizer", tokenizer), ("policy", policy)):
        recipe["train"] |= {"steps": 2, "micro_batch": 8}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return {
        "latents": {
            "run": f"encode {tmp_path / 'tokenizer.yaml'}", "after": ["stats"],
            "resources": {"nodes": 2, "processes_per_node": 1},
        },
        "tokenizer": {"train": str(tmp_path / "tokenizer.yaml")},
        "policy": {
            "train": str(tmp_path / "policy.yaml"), "set": {"policy.tokenizer": str(tmp_path / "tokenizer")},
            "resources": {"processes_per_node": 2},
        },
    }  # fmt: skip


def test_a_pipeline_stops_at_a_failed_stage_and_goes_on_where_it_stopped(here, cluster, toy, tmp_path):
    """Two slices of an array, one of them queued again by the administrator; then a stage that fails. Submitted again,
    it goes on, up to a policy that sees through the tokenizer of the stage before."""
    write_raw(tmp_path / "raw" / "can.hdf5")
    runs, out = tmp_path / "runs", tmp_path / "shards"
    convert = f"data convert robomimic {tmp_path / 'raw'} {{}} --size 32 --val-fraction 0.4"

    def submit(check: Path) -> str:
        stages: dict[str, Any] = {
            "shards": {"run": convert.format(out), "slices": 2},
            "check": {"run": f"data stats {check}"},
            "stats": {"run": f"data stats {out}"},
            "report": {"run": f"report {tmp_path}", "after": ["stats"]},
            **training(tmp_path, out, toy.vae),
        }
        file = tmp_path / "pipeline.yaml"
        file.write_text(yaml.safe_dump({"name": "p", "run_dir": str(runs), "stages": stages}, sort_keys=False))
        return here("submit", file, "--cluster", tmp_path / "profile.yaml")

    def states() -> list[tuple[str, str]]:
        return [(run["state"], run["detail"]) for run in json.loads(here("status", runs, "--json"))]

    (tmp_path / "nothing").mkdir()
    submit(tmp_path / "nothing")
    array = read(runs / "shards").job
    cluster.until(lambda: any(e.event == "started" and e.job == f"{array}_0" for e in events(runs / "shards")))
    cluster.run("scontrol", "requeue", f"{array}_0")
    cluster.until(lambda: not cluster.run("squeue", "-h", "-t", "PENDING,RUNNING,COMPLETING").strip())
    found = states()
    assert [word for word, _ in found] == ["finished", "failed", *["stopped"] * 5]
    assert f"{tmp_path / 'nothing'}: is empty" in found[1][1]
    assert {detail for _, detail in found[2:]} == {"p.check failed"}
    assert (story(runs / "shards").count("requeued"), story(runs / "stats")) == (1, ["submitted"])
    here(*convert.format(tmp_path / "straight" / "shards").split())
    assert tree(out) == tree(tmp_path / "straight" / "shards")

    assert "p.shards: done, skipped" in submit(out)
    cluster.until(lambda: not cluster.run("squeue", "-h", "-t", "PENDING,RUNNING,COMPLETING").strip(), 600)
    found = states()
    assert [word for word, _ in found] == [*["finished"] * 3, "failed", *["finished"] * 3], found
    assert story(runs / "shards").count("submitted") == 1
    assert sum("encoded" in log.read_text() for log in (runs / "latents" / "logs").iterdir()) == 2
    assert json.loads((tmp_path / "policy" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_a_sweep_is_one_array_of_runs(here, cluster, toy, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    words = ("submit", recipe, "--cluster", tmp_path / "profile.yaml", "--set", "train.steps=4")
    here(*words, "--sweep", "optimizer.lr=1e-3,4e-3")
    folder = tmp_path / "run" / "sweep"
    first, second = folder / "lr=0.001", folder / "lr=0.004"
    jobs = [str(read(run).job) for run in (first, second)]
    assert jobs[1] == jobs[0].replace("_0", "_1")
    cluster.until(lambda: all(cluster.state(job) == "COMPLETED" for job in jobs))
    assert story(first) == story(second) == ["submitted", "started", "finished"]
    table = here("runs", folder)
    assert "lr=0.001" in table
    found = {run["name"]: run for run in json.loads(here("runs", folder, "--json"))}
    losses = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for run in (first, second)]
    assert [found[f"toy-lr={lr}"]["loss"] for lr in ("0.001", "0.004")] == losses
    assert losses[0] != losses[1]
    assert "step 4/4" in (second / "logs" / "main.log").read_text()

    stages: dict[str, Any] = {"train": {"train": str(recipe)}}
    stages["train"]["set"] = {"train.steps": 4, "optimizer.lr": 1e-3, "run_dir": str(first)}
    stages["train"]["set"]["name"] = "toy-lr=0.001"
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"stages": stages}))
    again = ("submit", tmp_path / "p.yaml", "--cluster", tmp_path / "profile.yaml", "--dry-run")
    assert "p.train: done, skipped" in here(*again)
    assert "skipped" not in here(*again, "--set", "stages.train.set={train.steps: 5}")
