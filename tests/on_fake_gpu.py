"""The `stamo` command on a fake GPU: `python on_fake_gpu.py COUNTS train …` writes what it was asked into COUNTS.

A file of its own for each rank: COUNTS.0, COUNTS.1, ….
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState

from stamo_dist import cli, device
from tests.fake_gpu import FakeGpu


class Counted(FakeGpu):
    def synchronize(self) -> None:  # the last that a process does
        super().synchronize()
        said = {**self.cuda.said, "modes": self.cuda.modes, "selected": self.cuda.selected}
        Path(f"{counts}.{os.environ.get('RANK', '0')}").write_text(json.dumps(said))


def prepare_backend(self: PartialState, cpu: bool, *_: object) -> tuple[str, DistributedType]:
    assert not cpu, "Accelerate is told that there is no GPU"
    return "gloo", DistributedType.MULTI_GPU


def set_device(self: PartialState) -> None:
    self.device = torch.device("cpu")


os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # DDP takes no numbers of devices for what lies in host memory
PartialState._prepare_backend, PartialState.set_device = prepare_backend, set_device
counts = sys.argv.pop(1)
device._current = Counted()
cli.main()
