"""A global batch and weights that change at given steps: exact over restarts, and what a start may still change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from toy import write_recipe

BATCH = "train.global_batch={0: 8, 5: 16, 11: 12}"
WEIGHT = "data.sources.a.weight={0: 2, 5: 1, 8: 3}"  # with the batch, and by itself
STEPS = 16
SETTINGS = (
    f"train.steps={STEPS}", "train.log_samples=true", "train.ema=0.9", "train.checkpoint.keep=9", "train.micro_batch=4",
    "optimizer.schedule=wsd", "optimizer.decay_steps=4",
)  # fmt: skip
SIZES = [8] * 5 + [16] * 6 + [12] * 5


def lines(run: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict]:
    """Every logged value that does not measure time, and the samples of each step."""
    kept = ("step", "loss", "grad_norm", "lr", "global_batch")
    values = [
        {k: v for k, v in line.items() if k in kept or k.startswith(("loss/", "samples/", "lr/"))}
        for line in lines(run)
    ]
    read = {
        line["step"]: sorted(zip(line["samples"], line["checksums"], strict=True)) for line in lines(run, "samples")
    }
    return [{**line, "read": read[line["step"]]} for line in values]


@pytest.fixture
def train(toy, ranks, tmp_path):
    """Train the toy recipe in `tmp_path`/NAME on some processes; returns (exit code, what was printed)."""

    def start(name: str, processes: int, *settings: str, strategy: str = "ddp", check: bool = True) -> tuple[int, str]:
        recipe = tmp_path / name / "toy.yaml"
        if not recipe.exists():
            write_recipe(recipe, toy.shards, toy.vae, strategy=strategy)
        chosen = dict(setting.split("=", 1) for setting in (*SETTINGS, BATCH, WEIGHT, *settings))
        pairs = (x for field, value in chosen.items() for x in ("--set", f"{field}={value}"))
        return ranks(processes, "train", recipe, *pairs, check=check)

    return start


def forget(run: Path, step: int) -> None:
    """Remove the checkpoints after a step, and the exported model."""
    for later in (run / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    shutil.rmtree(run / "model", ignore_errors=True)


@pytest.mark.parametrize(
    ("strategy", "workers", "background", "step"),
    [("ddp", 2, "true", 4), ("zero2", 0, "false", 8), ("fsdp", 1, "true", 10)],
)
def test_running_again_over_the_changes(train, tmp_path, strategy, workers, background, step):
    """On 2 processes, from steps before and between the changes: the same samples, losses and rates, to the bit."""
    run = tmp_path / "a/run"
    settings = ("train.checkpoint.every=2", f"train.checkpoint.background={background}", f"data.workers={workers}")
    said = train("a", 2, *settings, strategy=strategy)[1]
    assert "global batch 8 = 2 × 1 × 4, 16 = 2 × 2 × 4 after step 5, 12 = 2 × 2 × 3 after step 11" in said
    assert "global batch 8 → 16 from step 6 on" in said
    assert "global batch 16 → 12 from step 12 on" in said
    before = curve(run)
    assert [line["global_batch"] for line in before] == [len(line["read"]) for line in before] == SIZES
    shares = [line["samples/a"] / line["global_batch"] for line in before]
    assert shares[:5] == pytest.approx([2 / 3] * 5, abs=0.1)
    assert shares[5:8] == pytest.approx([1 / 2] * 3, abs=0.1)
    assert shares[8:] == pytest.approx([3 / 4] * 8, abs=0.1)
    forget(run, step)
    settings = (*settings, f"data.workers={2 - workers}")
    assert f"after step {step}" in train("a", 2, *settings)[1]
    assert curve(run) == before


def test_other_processes_and_strategies_read_the_same(train, tmp_path):
    """Stopped before, between and after the changes, on 1 and 2 processes by turns; 4 may share each batch too."""
    train("whole", 1)
    parts = (("zero2", 2, 4), ("fsdp", 1, 7), ("ddp", 4, 12), ("zero3", 2, STEPS))
    for strategy, processes, last in parts:
        stop = (f"train.steps={last}", f"strategy.name={strategy}", "optimizer.schedule=constant")
        train("parts", processes, *stop, "optimizer.warmup_steps=0")
    train("constant", 1, "optimizer.schedule=constant", "optimizer.warmup_steps=0")
    expected, found = curve(tmp_path / "constant/run"), curve(tmp_path / "parts/run")
    assert [line["read"] for line in found] == [line["read"] for line in expected]
    assert [line["read"] for line in found] == [line["read"] for line in curve(tmp_path / "whole/run")]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in expected], rel=1e-4)


def test_virtual_workers_stay_identical(train, tmp_path):
    virtual = ("train.virtual_workers=4", "train.micro_batch=1")
    for name, processes in (("one", 1), ("two", 2)):
        train(name, processes, *virtual)
    assert curve(tmp_path / "two/run") == curve(tmp_path / "one/run")


def test_what_is_to_come_may_change_and_what_was_may_not(train, tmp_path):
    run, rate = tmp_path / "a/run", "optimizer.schedule=constant"  # which does not depend on train.steps
    train("a", 1, "train.steps=8", rate)
    before, written = curve(run), (run / "metrics.jsonl").read_bytes()

    past = {
        "train.global_batch={0: 8, 6: 16}": 'train.global_batch: {"0": 8, "5": 16, "11": 12} → {"0": 8, "6": 16}',
        "data.sources.a.weight={0: 2, 6: 1}": 'data.sources.a.weight: {"0": 2.0, "5": 1.0, "8": 3.0} → {"0": 2.0, "6"',
    }
    for setting, said in past.items():
        code, output = train("a", 1, setting, rate, check=False)
        assert code == 2
        assert "was trained on another mixture" in output
        assert said in output
        assert "may change after step 8" in output
    for setting in ("train.global_batch={0: 8, 5: 16, 8: 20}", "data.sources.a.weight={0: 2, 5: 1, 8: 3, 9: 1}"):
        code, output = train("a", 1, setting, rate, "seed=1", check=False)
        assert code == 2
        assert "seed: 0 → 1" in output
    assert (run / "metrics.jsonl").read_bytes() == written

    changes = ("train.global_batch={0: 8, 5: 16, 8: 20}", "data.sources.a.weight={0: 2, 5: 1, 10: 3}")
    said = train("a", 1, rate, *changes)[1]
    assert "train.global_batch: {0: 8, 5: 16, 11: 12} → {0: 8, 5: 16, 8: 20}" in said
    assert "data.sources.a.weight: {0: 2.0, 5: 1.0, 8: 3.0} → {0: 2.0, 5: 1.0, 10: 3.0}" in said
    assert curve(run)[:8] == before
    train("b", 1, rate, *changes)
    assert curve(run) == curve(tmp_path / "b/run"), "as if it had begun so"
    said = train("a", 1, rate, "train.steps=18", *changes)[1]
    assert "global_batch:" not in said


def test_a_batch_that_the_processes_cannot_share_is_refused_before_the_start(toy, stamo, tmp_path):
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    refused = stamo("train", recipe, "--nproc", 4, "--set", "train.global_batch={0: 8, 5: 18}", check=False)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if "global_batch" in line]
    assert line.endswith("train.global_batch: 18 (after step 5) is not divisible by 4 processes; it runs on 1, 2")
    assert not (tmp_path / "run").exists()


def test_rates_of_groups_are_logged_where_they_differ(train, tmp_path, stamo):
    run = tmp_path / "a/run"
    groups = (
        "optimizer.encoder_lr=0.5",
        "optimizer.encoder_start=3",
        "optimizer.lr_scale={decoder.transformer.proj_out: 10}",
    )
    train("a", 1, *groups)
    for line in lines(run):
        assert line["lr/encoder"] == (0.5 * line["lr"] if line["step"] > 3 else 0.0)
        assert line["lr/decoder.transformer.proj_out"] == 10 * line["lr"]
    stamo("report", run)
    page = (run / "report.html").read_text()
    assert "decoder.transformer.proj_out" in page.split("learning rate", 1)[1].split("</div>")[0]
    assert "samples per step" in page
    train("b", 1)
    assert not [key for line in lines(tmp_path / "b/run") for key in line if key.startswith("lr/")]
