"""Checkpoints that are damaged, unfinished, foreign or cannot be written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import write_recipe

from stamo_dist.checkpoint.load import read_weights
from stamo_dist.checkpoint.manifest import MANIFEST, read_checkpoint_manifest


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[int, float, float]]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in lines(run)]


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(toy, ranks, tmp_path_factory) -> Path:
    """A finished run of one process; returns its recipe."""
    recipe = write_recipe(tmp_path_factory.mktemp("finished") / "toy.yaml", toy.shards, toy.vae, strategy="zero2")
    ranks(1, "train", recipe)
    return recipe


@pytest.fixture
def recipe(finished, tmp_path) -> Path:
    """The recipe of a private copy of the finished run, in the folder `run` beside it."""
    copy = tmp_path / "toy.yaml"
    copy.write_text(finished.read_text().replace(str(finished.parent), str(tmp_path)))
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    return copy


def truncate(newest: Path) -> str:
    victim = max(read_checkpoint_manifest(newest).files)
    os.truncate(newest / victim, (newest / victim).stat().st_size // 2)
    return f"truncated: {victim}"


def flip(newest: Path) -> str:
    victim = min(read_checkpoint_manifest(newest).files)
    content = bytearray((newest / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / victim).write_bytes(content)
    return f"changed since it was written: {victim}"


def lose(newest: Path) -> str:
    victim = max(read_checkpoint_manifest(newest).files)
    (newest / victim).unlink()
    return f"missing: {victim}"


def garble(newest: Path) -> str:
    text = (newest / MANIFEST).read_text()
    (newest / MANIFEST).write_text(text.replace('"step": 20', '"step": 10'))
    return f"{MANIFEST} is damaged"


@pytest.mark.parametrize("damage", [truncate, flip, lose, garble])
def test_damaged_checkpoint_is_named_and_kept_and_the_one_before_is_used(ranks, recipe, damage):
    run = recipe.parent / "run"
    before = curve(run)
    newest = run / "checkpoints" / "step_00000020"
    message = damage(newest)
    output = ranks(1, "train", recipe)[1]
    assert f"DAMAGED CHECKPOINT, not used: {newest}: {message}" in output
    assert "after step 10" in output
    assert curve(run) == before
    assert names(run) == ["corrupt_step_00000020", "step_00000010", "step_00000020"]


def test_unfinished_checkpoints_are_removed_and_never_loaded(ranks, recipe):
    run = recipe.parent / "run"
    (run / "checkpoints/step_00000020" / MANIFEST).unlink()
    (run / "checkpoints/step_00000010").rename(run / "checkpoints/.step_00000010.g1.tmp")
    output = ranks(1, "train", recipe, "--set", "train.checkpoint.every=20")[1]
    assert "continuing" not in output
    assert output.count("it was never completed") == 2
    assert names(run) == ["step_00000020"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def committed(run: Path) -> dict[str, bytes]:
    return {name: content for name, content in snapshot(run).items() if not name.startswith(("logs/", "."))}


def newer_format(run: Path) -> list[str]:
    file = run / "checkpoints/step_00000020" / MANIFEST
    content = {**json.loads(file.read_text()), "format_version": 9}
    del content["sha256"]
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**content, "sha256": checksum}))
    return []


def damaged_and_named(run: Path) -> list[str]:
    flip(run / "checkpoints/step_00000020")
    return ["--resume", str(run / "checkpoints/step_00000020")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.sources.a.weight=5"], "data.sources.a.weight: 2.0 → 5.0"),
        (["--set", "seed=1"], "seed: 0 → 1"),
        (["--set", "model.compressor.depth=2"], "model.compressor.depth: 1 → 2"),
        (["--set", "stage=vae"], "is a checkpoint of the tokenizer stage, the recipe trains the vae stage"),
        (["--resume", "none"], "holds step_00000020"),
        (["--resume", "/nowhere"], "--resume /nowhere: there is no such checkpoint or run"),
        (["--resume", "/"], "no checkpoint.json"),
        (newer_format, "checkpoint format 9; this version of stamo reads 2 to 5"),
    ],
)
def test_refusals(ranks, recipe, arguments, message):
    run = recipe.parent / "run"
    given = arguments(run) if callable(arguments) else arguments
    before = snapshot(run)
    code, output = ranks(1, "train", recipe, *given, check=False)
    assert code == 2
    assert message in output
    assert "Traceback" not in output
    assert snapshot(run) == before


def test_a_refusal_by_several_processes_leaves_nothing(stamo, recipe):
    run = recipe.parent / "run"
    shutil.rmtree(run / "logs")
    before = snapshot(run)
    refused = stamo("train", recipe, "--nproc", 2, "--resume", "none", check=False)
    assert refused.returncode == 2
    assert "holds step_00000020" in refused.stderr
    assert snapshot(run) == before
    assert not (run / "logs").exists()


def test_finished_run_is_left_alone(ranks, recipe):
    assert "already trained to step 20" in ranks(1, "train", recipe)[1]


def test_a_run_that_was_killed_while_it_exported_exports_again(ranks, recipe):
    """The model that is there is that of an earlier step, from before the run was made longer."""
    run = recipe.parent / "run"
    (run / "exported.json").write_text('{"step": 10}')
    before = curve(run)
    assert f"exported {run}/model" in ranks(1, "train", recipe)[1]
    assert curve(run) == before
    assert "already trained to step 20" in ranks(1, "train", recipe)[1]


def test_a_checkpoint_that_the_user_named_is_not_replaced_by_another(ranks, recipe):
    code, output = ranks(1, "train", recipe, *damaged_and_named(recipe.parent / "run"), check=False)
    assert code == 2
    assert "changed since it was written" in output


def test_changed_data_with_another_source_goes_on_when_allowed(ranks, recipe):
    run = recipe.parent / "run"
    changed = ["--set", "train.steps=22", "--set", "data.sources.b.weight=0", "--allow-changed-data"]
    assert "after step 20" in ranks(1, "train", recipe, *changed)[1]
    seen = read_checkpoint_manifest(run / "checkpoints/step_00000022").state.samples
    assert seen == [lines(run)[-1]["samples/a"] * 2 + sum(m.get("samples/a", 0) for m in lines(run)[:20])]


def test_going_back_gives_the_later_history_up(ranks, recipe):
    run = recipe.parent / "run"
    before = curve(run)
    output = ranks(1, "train", recipe, "--resume", run / "checkpoints/step_00000010")[1]
    assert "kept" in output
    assert names(run) == ["abandoned_step_00000020", "step_00000010", "step_00000020"]
    assert curve(run) == before


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_saving_beside_the_training_saves_the_same(toy, ranks, tmp_path, strategy):
    runs = []
    for background in ("false", "true"):
        recipe = write_recipe(tmp_path / background / "toy.yaml", toy.shards, toy.vae, strategy=strategy)
        _, output = ranks(
            2, "train", recipe, "--set", f"train.checkpoint.background={background}", "--set",
            "train.checkpoint.every=5", "--set", "train.steps=10", "--set", "train.ema=0.9",
        )  # fmt: skip
        assert output.count(f"saved {tmp_path}") == 2
        runs.append(tmp_path / background / "run")
    assert curve(runs[0]) == curve(runs[1])
    for step in (5, 10):
        one, other = (read_weights(run / "checkpoints" / f"step_{step:08d}") for run in runs)
        assert one.keys() == other.keys()
        assert all((one[k] == other[k]).all() for k in one), step


FULL = """
import json, re, subprocess, sys, time
from pathlib import Path
run, recipe = Path(sys.argv[1]), sys.argv[2]
disk = run / "checkpoints"
disk.mkdir(parents=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
filler, metrics = disk / "filler", run / "metrics.jsonl"
train = subprocess.Popen([sys.executable, "-m", "stamo_dist.cli", "train", recipe, "--nproc", "2"])
def wait(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end and train.poll() is None, train.poll()
        time.sleep(0.005)
wait(lambda: (disk / "step_00000005" / "checkpoint.json").exists())
with filler.open("wb", buffering=0) as f:
    def fill():
        try:
            f.write(bytes(1 << 20))
        except OSError:
            pass
        return len(set(re.findall('"save_failed": [0-9]+', metrics.read_text()))) > 1  # and of the next try
    wait(fill)
print("left:", sorted(p.name for p in disk.iterdir()), flush=True)
filler.unlink()
code = train.wait()
print("whole:", sorted(p.name for p in disk.iterdir()), flush=True)
sys.exit(code)
"""


def test_full_disk_does_not_stop_the_training(toy, tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces, so no small disk: run as root, or sysctl kernel.unprivileged_userns_clone=1")
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae, strategy="zero2")
    recipe.write_text(recipe.read_text().replace("steps: 20", "steps: 120").replace("every: 10", "every: 5"))
    command = ["unshare", "-rm", sys.executable, "-c", FULL, str(tmp_path / "run"), str(recipe)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    failed = [m["save_failed"] for m in lines(tmp_path / "run") if "save_failed" in m]
    assert failed
    said = [
        m for m in lines(tmp_path / "run") if m["step"] >= failed[0] and ("save_failed" in m or "save_seconds" in m)
    ]
    steps = [m["step"] for m in said[: 1 + next(i for i, m in enumerate(said) if "save_seconds" in m)]]
    assert steps == list(range(steps[0], steps[-1] + 1)), "each line says so until a save succeeds"
    assert f"STEP {failed[0]} COULD NOT BE SAVED: rank" in result.stdout
    assert "No space left on device" in result.stdout
    left = next(line for line in result.stdout.splitlines() if line.startswith("left:"))
    assert "step_" in left.replace(".step_", "")
    assert "whole: ['step_00000115', 'step_00000120']" in result.stdout
    assert [m["step"] for m in lines(tmp_path / "run")] == list(range(1, 121))


FULL_AT_START = """
import subprocess, sys
from pathlib import Path
run, recipe, room = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
run.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", run], check=True)
(run / "filler").write_bytes(bytes((1 << 20) - room))
sys.exit(subprocess.run([sys.executable, "-m", "stamo_dist.cli", "train", recipe]).returncode)
"""


@pytest.mark.parametrize("room", [0, 16384])
def test_full_disk_at_the_start_is_said(toy, tmp_path, room):
    """Not even the folder can be prepared; or the recipe cannot be written into it."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces, so no small disk: run as root, or sysctl kernel.unprivileged_userns_clone=1")
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    command = ["unshare", "-rm", sys.executable, "-c", FULL_AT_START, str(tmp_path / "run"), str(recipe), str(room)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_a_run_that_was_cut_off_writes_nothing_once_it_is_restarted(toy, warm, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    run = tmp_path / "run"
    job = {"SLURM_JOB_ID": "42"}
    cut_off = warm.start("train", recipe, environment=job)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(lines(run)) < 3:
            assert cut_off.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        cut_off.send_signal(signal.SIGSTOP)
        again = warm.start("train", recipe, environment={**job, "SLURM_RESTART_COUNT": "1"})
        assert again.wait(200) == 0, again.stdout.read_text()
        before = committed(run)
        cut_off.send_signal(signal.SIGCONT)
        assert cut_off.wait(60) == 2
    finally:
        cut_off.kill()
    assert "a newer start of this run" in cut_off.stdout.read_text()
    assert committed(run) == before
    assert len(lines(run)) == 20
