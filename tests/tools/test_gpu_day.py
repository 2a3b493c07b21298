"""benchmarks/gpu_day.sh: what a GPU's first day runs, at toy size without one; no time is asserted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gpu import FakeGpu

from stamo_dist import device as devices

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_day.sh"
MEASURED = {
    "1": ["correctness", "doctor"],
    "2": ["tokenizer", "overhead", "memory", "checkpoint"],
    "3": ["policy", "lora", "serve", "decode", "encode"],
}


def day(out: Path, *words: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(out), "PYTHON": python}
    return subprocess.run([SCRIPT, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("call", MEASURED)
def test_it_runs_from_end_to_end(tmp_path: Path, call: str) -> None:
    done = day(tmp_path, call, "--tiny")
    assert done.returncode == 0, done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAILED"))]
    assert [line.split()[1].strip(",") for line in said] == MEASURED[call]
    for name in MEASURED[call]:
        assert (tmp_path / f"call{call}-{name}.txt").read_text()
    figures = [line for line in done.stdout.splitlines() if line.strip().startswith("»")]
    assert len(figures) >= 5
    expected = {"1": "the same bit by bit", "2": "predicted", "3": "model alone"}
    assert any(expected[call] in line for line in figures)
    assert (tmp_path / f"call{call}.txt").read_text() in done.stdout


def test_one_that_fails_is_said_and_the_others_run(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *plan_memory*) echo "no such thing"; exit 3;; esac\necho "» it: 3 GB"\n')
    python.chmod(0o755)
    done = day(tmp_path / "out", "2", python=str(python))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("ok", "FAILED"))] == ["ok", "ok", "FAILED", "ok"]
    assert next(line for line in lines if line.startswith("FAILED")).startswith("FAILED  memory, 0 s: exit code 3")
    assert any(line.strip() == "| no such thing" for line in lines)
    assert sum(line.strip() == "» it: 3 GB" for line in lines) == 4  # the first is where the GPU is named
    assert day(tmp_path, "4").returncode == day(tmp_path, "1", "--small").returncode == 2


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import step

    monkeypatch.setattr(devices, "_current", FakeGpu())
    step.policy(16, 1, tiny=False, lora=None, every=0)
    said = capsys.readouterr().out
    assert said.startswith("» policy of 7 B, whole, batch 16: not run, needs 1")
    assert said.endswith("NVIDIA H100 80GB HBM3 has 80\n")


def test_the_memory_of_a_gpu_is_planned_under_each_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that --tiny does not use: what it says and the script sets must go with every strategy."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import _toy

    from stamo_dist.recipe.load import load

    script = SCRIPT.read_text().replace("\\\n", "")
    [(strategies, words)] = re.findall(r"some=\((ddp [^)]*)\)\n(?:\s*#.*\n)?\s*measure memory (.*)", script)
    settings = re.findall(r"--set (\S+)", words)
    recipe = _toy.make(tmp_path, frames=4, size=256, large=True)
    for name in strategies.split():
        assert load(recipe, [*settings, f"strategy.name={name}", "data.workers=0"]).recipe.strategy.name == name
