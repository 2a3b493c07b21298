"""`stamo submit --cluster local` and the verbs that look after what it started."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from raw import write_raw
from toy import write_recipe

from stamo_dist.cli import steer
from stamo_dist.errors import RecipeError, RunError
from stamo_dist.launch import submit, supervise
from stamo_dist.launch.chain import sweep_orders
from stamo_dist.launch.profile import ProfileError, Resources, known_profile
from stamo_dist.launch.record import Event, events, read, record
from stamo_dist.launch.trained import without_trained
from stamo_dist.launch.undo import nothing_left
from stamo_dist.recipe.load import dump, load
from stamo_dist.run.lease import acquire

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The `stamo` command where there is no Slurm."""
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "PATH": "/usr/sbin:/sbin:/bin"}

    def stamo(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stamo_dist.cli", *map(str, words)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT, env=env)

    return stamo


def until(stamo: Callable[..., subprocess.CompletedProcess[str]], runs: Path, *states: str) -> list[str]:
    """Wait for the states of the runs; returns the details."""
    deadline = time.monotonic() + 60
    while True:
        found = json.loads(stamo("status", runs, "--json").stdout)
        if [run["state"] for run in found] == list(states):
            return [run["detail"] for run in found]
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_a_pipeline_on_this_machine(here, tmp_path):
    write_raw(tmp_path / "raw" / "can.hdf5")
    (tmp_path / "nothing").mkdir()
    runs, out, file = tmp_path / "runs", tmp_path / "shards", tmp_path / "pipeline.yaml"

    def submit(count: int = 3, **change: str) -> str:
        stages: dict[str, dict[str, Any]] = {
            "shards": {"run": f"data convert robomimic {tmp_path / 'raw'} {out} --size 32", "slices": 4},
            "check": {"run": f"data stats {tmp_path / 'nothing'}"},
            "stats": {"run": f"data stats {out}"},
        }
        for name, command in change.items():
            stages[name]["run"] = command
        stages = dict(list(stages.items())[:count])
        file.write_text(yaml.safe_dump({"name": "p", "run_dir": str(runs), "stages": stages}, sort_keys=False))
        done = here("submit", file)
        assert done.returncode == 0, done.stderr
        return done.stdout

    submit(1)
    watching = int(str(read(runs / "shards").job).removeprefix("local-"))
    os.kill(watching, signal.SIGSTOP)  # however slow this machine, it is not done before the others are submitted
    assert "p.shards: job local-" in submit()  # which goes on; the others come after it
    os.kill(watching, signal.SIGCONT)
    details = until(here, runs, "finished", "failed", "stopped")
    assert f"{tmp_path / 'nothing'}: is empty" in details[1]
    assert details[2] == "p.check failed"
    assert "converted; train" in here("logs", runs / "shards").stdout
    assert "p.shards: done, skipped" in submit(check=f"data check {out}")
    until(here, runs, "finished", "finished", "finished")
    assert len(events(runs / "shards")) == 3
    assert read(runs / "shards").tasks == 1  # one converter uses all cores
    said = submit(check=f"data check {out}")
    assert said.count("done, skipped") == 3


def test_what_is_wrong_is_said_before_anything_starts(here, tmp_path):
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        """\
stages:
  a: {run: data convert libero x y --sise 3}
  b: {train: recipes/nope.yaml}
  c: {run: eval foo}
  d: {run: train recipes/vae_demo.yaml}
  e: {train: recipes/vae_demo.yaml, set: {train.stebs: 3}}
"""
    )
    done = here("submit", file)
    assert done.returncode == 2
    for line, words in enumerate(
        ("No such option: --sise", "recipes/nope.yaml: no such file", "there are reconstruct", "train: RECIPE",
         "train.stebs: no such field; did you mean steps?"), 2,
    ):  # fmt: skip
        assert any(f"pipeline.yaml:{line}: " in said and words in said for said in done.stderr.splitlines()), words
    for stages, words in (
        ("{a: {run: data stats x, after: [b]}, b: {run: data stats x}}", "stages.a.after: b is no stage above a"),
        ("{a: {train: x, run: y}}", "stages.a: give either train: RECIPE or run: COMMAND"),
        ("{a: {run: report x, slices: 3}}", "slices: only `data convert` can be shared out"),
    ):
        file.write_text(f"stages: {stages}\n")
        done = here("submit", file)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "runs").exists()


def test_where_one_trains_by_hand_nothing_is_submitted(here, toy, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    with acquire(tmp_path / "run"):
        done = here("submit", recipe, "--cluster", "local")
    assert done.returncode == 2
    assert f"run_dir: {tmp_path / 'run'}: process {os.getpid()} on " in done.stderr
    assert "is training here; stop it (Ctrl-C), then submit" in done.stderr
    assert not (tmp_path / "run" / "launch").exists()


def test_sweeps_that_cannot_be(here, toy, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    for sweep, words in (
        ("optimizer.lr", "write FIELD=VALUE,VALUE"),
        ("optimizer.lr=1,1", "a value is given twice"),
        ("optimizer.lr=1e-3,x", "optimizer.lr: must be a number above 0, not x"),
        ("train.global_batch=8,7", "7 is not divisible by 2 processes"),
    ):
        profile = tmp_path / "two.yaml"
        profile.write_text("backend: local\nprocesses_per_node: 2\n")
        done = here("submit", recipe, "--cluster", profile, "--sweep", sweep)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_that_slurm_was_not_asked(here, toy, tmp_path):
    recipe, profile = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "gpu.yaml"
    profile.write_text("gpus_per_node: 1\ntime: 1:00:00\n")
    words = {"local": "Slurm is not asked: it would run", profile: "Slurm was not asked, there is none here"}
    for cluster, last in words.items():
        said = here("submit", recipe, "--cluster", cluster, "--sweep", "optimizer.lr=0.1,0.2", "--dry-run").stdout
        assert said.splitlines()[-1].startswith(last)
        assert said.count(last) == 1


def trained(run: Path, recipe: Path, step: int, *overrides: str) -> None:
    """A run folder as a finished training leaves it."""
    place = run / "checkpoints" / f"step_{step:08}"
    place.mkdir(parents=True)
    (place / "checkpoint.json").write_text("{}")
    (run / "exported.json").write_text(json.dumps({"step": step}))
    (run / "resolved.yaml").write_text(dump(load(recipe, [f"run_dir={run}", *overrides]).recipe))


def test_what_is_trained_already_is_not_submitted(here, toy, tmp_path):
    recipe, run = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "run"
    trained(run, recipe, 20)

    def submit(*words: str) -> str:
        done = here("submit", recipe, "--cluster", "local", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for dry_run in ((), ("--dry-run",)):
        assert submit(*dry_run) == f"{run}: already trained to step 20; nothing is submitted\n"
    beyond = f"{run}: is at step 20, beyond train.steps (10): nothing is trained; nothing is submitted\n"
    assert submit("--set", "train.steps=10") == beyond
    other = submit("--set", "model.compressor.dim=64")
    assert "it was trained with another recipe, model.compressor.dim: 32 → 64\n" in other
    assert "choose another run_dir" in other
    assert not (run / "launch").exists()
    assert "1 process on this machine" in submit("--set", "train.steps=30", "--dry-run")
    trained(run / "sweep" / "lr=0.1", recipe, 20, "optimizer.lr=0.1")
    swept = submit("--sweep", "optimizer.lr=0.1,0.2", "--dry-run")
    assert f"{run / 'sweep' / 'lr=0.1'}: already trained to step 20" in swept
    assert swept.count("1 process on this machine") == 1


@pytest.mark.parametrize("given", ["optimizr.lr=1,2", "optimizer.lr=1,-2"])
def test_a_wrong_value_of_a_sweep_is_named_by_its_option(toy, tmp_path, given):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    with pytest.raises(RecipeError) as refused:
        sweep_orders(recipe, "local", [given], [], Resources())
    [problem] = refused.value.problems
    assert problem.startswith(f"--sweep {given.partition('=')[0]}: ")


def test_of_an_array_only_what_is_left(toy, tmp_path):
    recipe, run = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "run"
    profile = tmp_path / "gpu.yaml"
    profile.write_text("backend: slurm\ngpus_per_node: 1\ntime: 1:00:00\n")
    rates = ["0.1", "0.2", "0.3"]
    orders, _ = sweep_orders(recipe, str(profile), [f"optimizer.lr={','.join(rates)}"], [], Resources())
    assert without_trained(orders) == (orders, [])
    for rate in rates:
        trained(run / "sweep" / f"lr={rate}", recipe, 20, f"optimizer.lr={rate}")
        [order] = left if (left := without_trained(orders)[0]) else [None]
        assert (order.tasks if order else 0) == 2 - rates.index(rate)
        assert order is None or order.launch == order.members[0].launch


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    """Also where nothing can be undone, as in the folder of somebody else."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    record(tmp_path, Event("submitted"))
    monkeypatch.setattr(os, "truncate", refuse)
    with pytest.raises(RunError, match=r"cannot be written \(Permission denied\)"), nothing_left(tmp_path):
        refuse()


def test_it_goes_on_with_the_profile_and_in_the_folder_of_its_submission(toy, tmp_path, monkeypatch):
    """Also with more nodes, from another folder, and when the profile's file has gone."""
    home, other, folders = tmp_path / "home", tmp_path / "other", []
    monkeypatch.setattr(supervise, "start", lambda runs: folders.append(Path.cwd()) or "local-999999999")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shards, vae = (Path(os.path.relpath(path, home)) for path in (toy.shards, toy.vae))
    write_recipe(home / "toy.yaml", shards, vae)
    (home / "lab.yaml").write_text("{backend: local, max_restarts: 7, environment: {A: 1}}")
    other.mkdir()
    monkeypatch.chdir(home)
    submit.submit(submit.plan("toy.yaml", "lab.yaml"))
    run = home / "run"
    record(run, Event("cancelled"))
    (home / "lab.yaml").unlink()
    monkeypatch.chdir(other)
    assert "goes on from the start" in steer.resume(run, nodes=2)
    assert folders == [home, home]
    launch = read(run)
    assert (launch.nodes, launch.cluster, launch.max_restarts, launch.recipe) == (2, "lab", 7, "toy.yaml")
    assert launch.profile["environment"] == {"A": "1"}
    with pytest.raises(ProfileError, match="--set time: 'soon' is no time limit"):
        known_profile({**launch.profile, "backend": "slurm"}, ["time=soon"], "profile lab")
