"""Losses and gradients that are not finite, and ranks that are slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import make_source, write_recipe
from warm import Warm

from stamo_dist.distributed.rank import reserve_port
from stamo_dist.exit_codes import EXIT_PREEMPTED

FAULTY = Path(__file__).resolve().parent.parent / "faulty.py"


@pytest.fixture(scope="module")
def train(warm: Warm) -> Callable[..., tuple[int, str]]:
    def run(recipe: Path, faults: dict, processes: int, *settings: str, per_node: int | None = None) -> tuple[int, str]:
        """Exit code and output of rank 0, of a run with faults (see tests/faulty.py)."""
        local = per_node or processes
        common = {
            "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(reserve_port()),
        }  # fmt: skip
        command = [json.dumps(faults), "train", str(recipe), *(x for s in settings for x in ("--set", s))]
        ranks = [
            warm.start(
                *command, program=FAULTY, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank % local)}
            )
            for rank in range(processes)
        ]
        try:
            codes = {process.wait(240) for process in ranks}
        finally:
            for process in ranks:
                process.kill()
        output = [process.stdout.read_text() for process in ranks]
        assert len(codes) == 1, output
        return codes.pop(), output[0]

    return run


def lines(recipe: Path) -> list[dict]:
    return [json.loads(line) for line in (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()]


def column(lines: list[dict], key: str) -> list[float]:
    return [float("nan") if line[key] is None else line[key] for line in lines]


@pytest.fixture(scope="module")
def reference(toy, train, tmp_path_factory) -> list[dict]:
    """A run under ddp: a loss is bad in step 5 on rank 1, a gradient in step 8 on rank 0, and rank 1 is slow."""
    recipe = write_recipe(tmp_path_factory.mktemp("ddp") / "toy.yaml", toy.shards, toy.vae)
    code, output = train(recipe, {"0": {"gradient": [8]}, "1": {"nan": [5], "slow": [0.1]}}, 2, "train.ema=0.9")
    assert code == 0, output
    assert "step 5: the loss on rank 1 is not finite: no update; 1 in a row" in output
    assert "step 8: the gradient is not finite: no update; 1 in a row" in output
    return lines(recipe)


def test_bad_steps_are_skipped_and_counted(reference):
    assert [line["step"] for line in reference if line["grad_norm"] is None] == [5, 8]
    assert [line["step"] for line in reference if line["loss"] is None] == [5]
    assert [line.get("bad_steps", 0) for line in reference] == [0] * 4 + [1] * 3 + [2] * 13
    lr = [line["lr"] for line in reference]
    assert lr[4] == lr[5]
    assert lr[7] == lr[8] < lr[6]
    assert reference[-1]["loss"] < reference[0]["loss"]


def test_slow_rank_is_named(reference):
    later = reference[2:]
    assert sum(line["slowest_rank"] == 1 for line in later) > len(later) / 2
    spreads = sorted(line["step_seconds_max"] - line["step_seconds_min"] for line in later)
    assert spreads[len(spreads) // 2] == pytest.approx(0.1, abs=0.05)
    waits = sorted(line["step_seconds_max"] * line["comm_wait"] for line in later)
    assert waits[len(waits) // 2] == pytest.approx(0.1, abs=0.05), "two micro-batches: one rank waits 0.2 s, one not"


def test_bad_steps_under_zero2(toy, train, tmp_path, reference):
    """A bad step leaves nothing behind where DeepSpeed steps inside its backward: losses go on as under ddp."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae, strategy="zero2")
    code, output = train(recipe, {"0": {"gradient": [8]}, "1": {"nan": [5]}}, 2, "train.ema=0.9")
    assert code == 0, output
    for key in ("loss", "grad_norm", "lr"):
        assert column(lines(recipe), key) == pytest.approx(column(reference, key), rel=1e-5, nan_ok=True), key


def test_stuck_rank_is_named(toy, train, tmp_path):
    """Every rank leaves its stack and exits so that the run is started again; the first names who is behind."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    code, output = train(recipe, {"1": {"stuck": [3]}}, 2, "train.step_timeout=5")
    assert code == EXIT_PREEMPTED, output
    assert (
        "no progress for 5 s (train.step_timeout): rank 1 is behind the others. Last seen: rank 1: computing" in output
    )
    stacks = [(tmp_path / "run/logs" / f"stack_rank_{rank:05d}.txt").read_text() for rank in range(2)]
    assert "faulty.py" in stacks[1]
    assert "in backward" in stacks[0]


def test_a_measurement_may_take_longer_than_a_step(toy, train, tmp_path):
    """Rank 0 measures for longer than `train.step_timeout`, and the rank that waits is not taken for hung."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    settings = ["train.steps=4", "train.checkpoint.every=2", "evaluate.every=2", "evaluate.reconstruct=1"]
    code, output = train(recipe, {"0": {"evaluate": [12]}}, 2, "train.step_timeout=5", *settings)
    assert code == 0, output
    assert "step 2 evaluated in 1" in output
    settings += ["train.step_timeout=5", "train.evaluate_timeout=6", "train.steps=8"]
    code, output = train(recipe, {"0": {"evaluate": [60]}}, 2, *settings)
    assert code == EXIT_PREEMPTED, output
    assert "no progress for 6 s (train.evaluate_timeout)" in output


def test_processes_that_see_different_data_leave(toy, train, tmp_path):
    """Rank 1, of another node, comes when a source has grown already."""
    shards = tmp_path / "shards"
    make_source(shards, "a", episodes=6, shard_bytes=1)
    make_source(shards, "b")
    recipe = write_recipe(tmp_path / "toy.yaml", shards, toy.vae)
    code, output = train(recipe, {"1": {"grown": [str(shards / "a")]}}, 2, "train.steps=2", per_node=1)
    assert code == EXIT_PREEMPTED, output
    assert "the processes see different data" in output
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_roll_back_once(toy, train, tmp_path):
    """Many bad steps: the run goes on from before them, without what it read since. Again: it says why and stops."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    run = tmp_path / "run"
    settings = ("train.max_bad_steps=3", "train.checkpoint.every=5", "train.checkpoint.keep=9")
    code, output = train(recipe, {"0": {"nan": [13, 14, 15]}}, 1, *settings)
    assert code == 0, output
    assert f"went back to {run}/checkpoints/step_00000010" in output
    passed = [json.loads(line) for line in (run / "bad_batches.jsonl").read_text().splitlines()]
    assert [(line["step"], line["finite"]) for line in passed] == [
        (11, True), (12, True), (13, False), (14, False), (15, False),
    ]  # fmt: skip
    assert all(len(line["samples"]) == 8 for line in passed)
    curve = [(line["step"], line["loss"], line["grad_norm"]) for line in lines(recipe)]
    assert [step for step, *_ in curve] == list(range(1, 21))
    assert all(loss is not None for _, loss, _ in curve)

    for name in ("checkpoints/step_00000015", "checkpoints/step_00000020"):
        (run / name / "checkpoint.json").unlink()
    code, output = train(recipe, {"0": {"nan": [22, 23, 24]}}, 1, *settings)  # read in steps 17 to 19
    assert code == 2, output
    assert "after step 10" in output
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines(recipe)][:16] == curve[:16]
    assert "loss or gradient was not finite in steps 17 to 19 (train.max_bad_steps), after the run was rolled" in output
    assert "lower optimizer.lr" in output
    assert "Traceback" not in output
