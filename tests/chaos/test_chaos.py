"""`stamo chaos`: a training survives twenty random faults, and what does not survive is found."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path

import psutil
import pytest
from toy import write_recipe

from stamo_dist.chaos import results
from stamo_dist.chaos.compare import IDENTICAL, NOT, WITHIN, History, compare
from stamo_dist.chaos.faults import BETWEEN, CHECKPOINT, FLIPPED, Fault
from stamo_dist.chaos.harness import Harness, Plan
from stamo_dist.chaos.monitor import TrainingStart
from stamo_dist.chaos.reference import RunSegment, segments
from stamo_dist.chaos.starts import MODULES, ForkServer
from stamo_dist.chaos.trial import FaultSchedule, Pace, Trial


@pytest.fixture(scope="module")
def tried(toy, stamo, tmp_path_factory) -> Path:
    """The folder of a chaos run of twenty faults."""
    folder = tmp_path_factory.mktemp("chaos")
    recipe = write_recipe(folder / "toy.yaml", toy.shards, toy.vae, workers=1)
    result = stamo(
        "chaos", recipe, "--kills", 20, "--seed", 4, "--warm", "--out", folder / "out", "--patience", 60,
        "--set", "train.steps=100", "--set", "train.checkpoint.every=7", "--set", "data.augment.brightness=0",
        timeout=600,
    )  # fmt: skip
    print(result.stdout)
    return folder / "out"


def test_twenty_faults_change_nothing(tried):
    found = results.read(tried)
    faults = [fault for result in found for fault in result.faults]
    assert len(faults) == 20
    assert len({(fault.whom, fault.what, fault.moment) for fault in faults}) > 10
    assert {result.processes for result in found} == {"2", "1, 2", "1"}
    for result in found:
        assert (result.lost, result.repeated, result.problems) == (0, 0, [])
        assert result.losses == IDENTICAL
    assert sum(result.redone for result in found) > 0


def change(run: Path, name: str, number: int, **values: object) -> None:
    """Change one line of a log."""
    lines = (run / name).read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **values})
    (run / name).write_text("\n".join(lines) + "\n")


def test_an_out_that_cannot_be_has_no_results_yet(tmp_path):
    (tmp_path / "file").write_text("")
    assert results.read(tmp_path / "file" / "out") == []


def test_what_is_wrong_is_found(tried, tmp_path):
    """In copies of an untouched run: another sample, other content, a missing step, a loss that is one bit off."""
    untouched = [History.read(tried / f"untouched-ddp-{size}-0") for size in (1, 2)]
    line = json.loads((tried / "untouched-ddp-2-0/samples.jsonl").read_text().splitlines()[40])
    loss = untouched[1].values[40][1]["loss"]

    def doctored(name: str, **values: object) -> History:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tried / "untouched-ddp-2-0", run)
        change(run, name, 40, **values)
        return History.read(run)

    assert compare(untouched[1], untouched[1:]).good
    other = compare(doctored("samples.jsonl", samples=[*line["samples"][1:], line["samples"][1]]), untouched[1:])
    assert (other.lost, other.repeated, other.other, other.good) == (1, 1, [41], False)
    other = compare(doctored("samples.jsonl", checksums=[0] * 8), untouched[1:])
    assert (other.lost, other.repeated, other.other, other.good) == (0, 0, [41], False)
    other = compare(doctored("samples.jsonl", step=40), untouched[1:])
    assert (other.other, other.good) == ([40, 41], False)
    other = compare(doctored("metrics.jsonl", step=40), untouched[1:])
    assert (other.losses, other.good) == (NOT, False)
    bit = doctored("metrics.jsonl", loss=loss * (1 + 2**-24))
    assert compare(bit, untouched[1:]).losses == NOT
    apart = [untouched[1], doctored("metrics.jsonl", loss=loss * 1.00001)]  # as of a device that is not deterministic
    assert compare(bit, apart).losses == WITHIN
    assert compare(doctored("metrics.jsonl", loss=loss * 1.001), apart).losses == NOT


def test_a_twin_does_each_step_on_as_many_processes(tried):
    """A training that changed its number of processes equals its twin, and no training on a fixed number."""
    changed = History.read(tried / "ddp-1-2-1")
    assert compare(changed, [History.read(tried / "twin-ddp-1-2-1-0")]).losses == IDENTICAL
    for size in (1, 2):
        assert compare(changed, [History.read(tried / f"untouched-ddp-{size}-0")]).losses == NOT
    # Steps from 8 on of the third start, and all of the fourth's, were done again by the fifth.
    starts = [TrainingStart(*start) for start in ((0, 2), (5, 1), (9, 2), (7, 1), (7, 2), (12, 2))]
    assert segments(starts) == [RunSegment(2, 5), RunSegment(1, 7), RunSegment(2, None)]
    assert segments([TrainingStart(0, 1), TrainingStart(0, 2), TrainingStart(0, 1)]) == [RunSegment(1, None)]


def test_a_run_that_leaves_a_batch_out_is_found(toy, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    settings = ("train.steps=40", "train.checkpoint.every=5", "data.augment.brightness=0")
    plan = Plan(recipe, settings, 2, 0, ["ddp"], [1], tmp_path / "out", 1, convert=False, patience=60)
    starter = ForkServer((*MODULES, "tests.chaos.forgetful"))
    try:
        Harness(plan, starter, print).run()
    finally:
        starter.close()
    found = results.read(tmp_path / "out")
    assert Counter(result.good for result in found)[False] == 1
    assert found[-1].lost or found[-1].repeated
    assert found[-1].losses == NOT


def test_a_run_from_another_begins_anew_when_its_only_checkpoint_is_damaged(toy, stamo, tmp_path):
    """That start reads no weights to begin with, so it leaves to be started again."""
    parent = write_recipe(tmp_path / "parent/toy.yaml", toy.shards, toy.vae)
    stamo("train", parent, "--set", "train.steps=2")
    recipe, run = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae), tmp_path / "trial"
    settings = (
        f"run_dir={run}",
        f"init_from={tmp_path}/parent/run",
        "train.checkpoint.every=5",
        "train.checkpoint.keep=1",
    )
    arguments = ["train", str(recipe), *(x for setting in settings for x in ("--set", setting))]
    faults = FaultSchedule(deque([Fault(CHECKPOINT, FLIPPED, BETWEEN, 0.5, 0.5)]), random.Random(0), gap=4)
    starter = ForkServer(MODULES)
    try:
        outcome = Trial(starter, arguments, run, [1], faults, pace=Pace(1, 0.1, 0.1), patience=60, say=print).run()
    finally:
        starter.close()
    assert (outcome.problems, outcome.finished, len(outcome.faults)) == ([], True, 1)
    assert outcome.starts == 3
    assert "leaving with code 75 to be started again, from init_from" in (tmp_path / "trial.log").read_text()


def test_ctrl_c_leaves_nothing_running(toy, tmp_path):
    """Hit twice. As a user starts it, without --warm: a launcher, two ranks and their workers."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae, workers=1)
    command = [
        sys.executable,
        "-m",
        "stamo_dist.cli",
        "chaos",
        str(recipe),
        "--world-sizes",
        "2",
        "--out",
        tmp_path / "out",
    ]
    settings = [x for s in ("train.steps=5000", "data.augment.brightness=0") for x in ("--set", s)]
    chaos = subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, text=True)
    try:
        metrics, deadline = tmp_path / "out/untouched-ddp-2-0/metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert chaos.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running = psutil.Process(chaos.pid).children(recursive=True)
        assert len(running) >= 5
        chaos.send_signal(signal.SIGINT)
        time.sleep(0.02)
        chaos.send_signal(signal.SIGINT)
        output = chaos.communicate(timeout=60)[0]
    finally:
        chaos.kill()
    assert chaos.returncode == 130, output
    _, left = psutil.wait_procs(running, timeout=10)
    assert not left
