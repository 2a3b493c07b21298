"""A Slurm cluster, and runs on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from cluster import Cluster, missing
from toy import write_recipe
from warm import Warm

from stamo_dist.launch.record import Event, events, main_log, read

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes with 4 CPUs."""
    if why := missing():
        pytest.skip(f"no Slurm cluster: {why}")
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@dataclass
class Run:
    """A submitted run."""

    folder: Path
    cluster: Cluster
    warm: Warm
    command: list[str]  # of `stamo`, that trains its recipe
    said: str  # when it was submitted

    @property
    def job(self) -> str:
        job = read(self.folder).job
        assert job is not None
        return job

    @property
    def events(self) -> list[Event]:
        return events(self.folder)

    @property
    def story(self) -> list[str]:
        return [e.event for e in self.events]

    @property
    def steps(self) -> int:
        """The last logged step."""
        lines = self.metrics()
        return lines[-1]["step"] if lines else 0

    def metrics(self, folder: Path | None = None) -> list[dict[str, Any]]:
        file = (folder or self.folder) / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def release(self, *patches: tuple[str, str]) -> None:
        """Let it start, with code appended to modules of its snapshot: (file below stamo_dist, code)."""
        code = Path(read(self.folder).snapshot or "") / "code" / "stamo_dist"
        for file, text in patches:
            with (code / file).open("a") as f:
                f.write(text)
        self.cluster.run("scontrol", "release", self.job)

    def until(self, condition: Callable[[], object], seconds: float = 300) -> None:
        def said() -> str:
            log = main_log(self.folder)
            return "\n".join([*map(str, self.events), log.read_text() if log.exists() else ""])

        self.cluster.until(condition, seconds, said)

    def starts(self, count: int, steps: int = 1) -> None:
        """Wait until its start number `count` has made so many steps."""
        self.until(lambda: self.story.count("started") == count)
        before = [e for e in self.events if e.event == "started"][-1].step or 0
        self.until(lambda: self.steps >= before + steps)

    def ends(self, how: str, seconds: float = 300) -> None:
        self.until(lambda: self.story[-1] == how, seconds)
        self.until(lambda: self.cluster.state(self.job) not in ("RUNNING", "COMPLETING"))

    def assert_as_uninterrupted(self, *, processes: int, exactly: bool = True) -> None:
        """Losses, gradient norms and samples are those of a run on this machine that nobody disturbed."""
        whole = self.folder.parent / "whole"
        settings = [f"run_dir={whole}", "tracking.wandb=off"]
        command = [*self.command, "--nproc", str(processes), *(w for s in settings for w in ("--set", s))]
        done = self.warm.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        expected, got = self.metrics(whole), self.metrics()
        assert [m["step"] for m in got] == [m["step"] for m in expected]
        for e, g in zip(expected, got, strict=True):
            assert {k: v for k, v in g.items() if k.startswith("samples/")} == {
                k: v for k, v in e.items() if k.startswith("samples/")
            }
            tolerance = 0 if exactly else 1e-4
            assert g["loss"] == pytest.approx(e["loss"], rel=tolerance, abs=0), g["step"]
            assert g["grad_norm"] == pytest.approx(e["grad_norm"], rel=10 * tolerance, abs=0), g["step"]


@pytest.fixture
def submit(cluster: Cluster, toy: SimpleNamespace, warm: Warm, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`submit(name, {profile}, settings…)` queues the toy recipe, held until `.release()`."""
    made: list[Run] = []

    def queue(name: str, profile: dict[str, Any], *settings: str) -> Run:
        folder = tmp_path / name
        recipe = write_recipe(folder / "toy.yaml", toy.shards, toy.vae)
        given = {
            "cpus_per_gpu": 1, "time": "00:10:00", "signal_delay": 30, "environment": {"OMP_NUM_THREADS": 1}, **profile,
            "sbatch": {"hold": True, **profile.get("sbatch", {})},
        }  # fmt: skip
        (folder / "profile.yaml").write_text(yaml.safe_dump(given))
        words = [w for s in settings for w in ("--set", s)]
        command = [sys.executable, "-m", "stamo_dist.cli"]
        began = time.monotonic()
        done = subprocess.run(
            [*command, "submit", str(recipe), "--cluster", str(folder / "profile.yaml"), *words],
            check=False, capture_output=True, text=True, timeout=180, cwd=ROOT,
            env={**cluster.env, "XDG_STATE_HOME": str(tmp_path / "state")},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert time.monotonic() - began < 20
        made.append(Run(folder / "run", cluster, warm, ["train", str(recipe), *words], done.stdout + done.stderr))
        return made[-1]

    yield queue
    for run in made:
        cluster.run("scancel", run.job, check=False)
    for run in made:
        cluster.until(lambda run=run: cluster.state(run.job) not in ("RUNNING", "COMPLETING", "PENDING"))


@pytest.fixture
def preempt(cluster: Cluster) -> Callable[[], None]:
    """Another job takes all nodes, for a second."""

    def take() -> None:
        wish = ["sbatch", "--parsable", "-p", "high", "-N3", "-c4", "-o", os.devnull, "--wrap", "sleep 1"]
        job = cluster.run(*wish).strip()
        cluster.until(lambda: cluster.state(job) == "COMPLETED")

    return take


@pytest.fixture
def stamo_there(cluster: Cluster, tmp_path: Path) -> Callable[..., str]:
    """The `stamo` command on the cluster's login node."""

    def run(*words: object, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "stamo_dist.cli", *map(str, words)], check=False, capture_output=True, text=True,
            timeout=300, cwd=ROOT, env={**cluster.env, "XDG_STATE_HOME": str(tmp_path / "state"), "COLUMNS": "200"},
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return run
