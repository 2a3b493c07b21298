"""Every start pays for what it imports: nothing that it does not use."""

from __future__ import annotations

import json
import subprocess
import sys

STAGES = {
    "the launcher": ("import stamo_dist.cli.app, stamo_dist.launch.local", "torch streaming numpy"),
    "training": (
        "import stamo_dist.train",
        "transformers diffusers deepspeed streaming.base.dataset torchvision wandb",
    ),
    "the tokenizer": ("import stamo_dist.tasks.tokenizer", "scipy peft deepspeed matplotlib streaming.base.dataset"),
}
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
        assert not set(unused.split()) & set(json.loads(line)), stage
