"""Every start pays for what it imports: nothing that it does not use."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from stamo_dist.words import print_in_any_locale

ROOT = Path(__file__).parents[2]

STAGES = {
    "the launcher": ("import stamo_dist.cli.app, stamo_dist.launch.local", "torch streaming numpy"),
    "training": (
        "import stamo_dist.train",
        "transformers diffusers deepspeed streaming.base.dataset torchvision wandb",
    ),
    "the tokenizer": ("import stamo_dist.tasks.tokenizer", "scipy peft deepspeed matplotlib streaming.base.dataset"),
    "a rollout": ("import stamo_dist.evaluate.rollout", "torchmetrics scipy matplotlib deepspeed peft"),
}
#: What transformers 5 imports by itself.
BY_TRANSFORMERS = {"scipy"} if int(version("transformers").partition(".")[0]) > 4 else set[str]()
ALL_OF_STREAMING = """
from streaming import MDSWriter, StreamingDataset
from streaming.base import Stream
import streaming.base.format, streaming.base.stream
assert MDSWriter is streaming.base.format.MDSWriter
assert Stream is streaming.base.stream.Stream is streaming.Stream
assert streaming.text and streaming.base.dataset.StreamingDataset is StreamingDataset
"""


def test_nothing_unused_is_imported_and_streaming_is_whole_when_asked_for() -> None:
    program = "import json, sys\n"
    for statement, _ in STAGES.values():
        program += f"{statement}\nprint(json.dumps(list(sys.modules)))\n"
    run = subprocess.run(
        [sys.executable, "-c", program + ALL_OF_STREAMING], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    for (stage, (_, unused)), line in zip(STAGES.items(), run.stdout.splitlines(), strict=True):
        assert not (set(unused.split()) - BY_TRANSFORMERS) & set(json.loads(line)), stage


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("export nowhere", "nowhere: no run folder and no name of a run"),
        ("export nowhere out --checkpoint best", "nowhere: no run folder and no name of a run"),
        ("export nowhere --push lab/x", "--push lab/x: nowhere is no exported folder"),
        ("report nowhere", "nowhere: no run folder and no name of a run"),
        ("plan tokenizer_demo --set optimizer.lr=-1", "optimizer.lr: must be a number above 0, not -1"),
        ("plan tokenizer_demo --serve int4", "--serve: int4 is unknown"),
        ("mix tokenizer_demo --set optimizer.lr=-1", "optimizer.lr: must be a number above 0, not -1"),
        ("train tokenizer_demo --set optimizer.lr=-1", "optimizer.lr: must be a number above 0, not -1"),
        ("encode tokenizer_demo --set optimizer.lr=-1", "optimizer.lr: must be a number above 0, not -1"),
    ],
)
def test_what_is_wrong_at_first_sight_is_said_before_torch_is_imported(command: str, said: str, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from stamo_dist.cli import main\n"
        f"sys.argv = ['stamo', *{command.split()!r}]\nmain()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr


def test_a_locale_without_utf_8_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "latin-1"))
    print_in_any_locale()
    print("2 × → é", flush=True)
    assert shown.getvalue() == b"2 \xd7 ? \xe9\n"
