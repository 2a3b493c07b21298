"""No code runs when a checkpoint of DeepSpeed's is read."""

from __future__ import annotations

import os

import pytest
import torch

from stamo_dist.checkpoint import deepspeed_files as zerofiles
from stamo_dist.errors import CheckpointError


class Planted:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_foreign_pickles_are_refused(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    torch.save({"scaler": LossScaler(2.0), "weights": torch.arange(3)}, tmp_path / "good.pt")
    read = zerofiles.load(tmp_path / "good.pt", mmap=True)
    assert read["scaler"].loss_scale == 2.0
    assert read["weights"].tolist() == [0, 1, 2]
    torch.save({"scaler": Planted(tmp_path / "planted")}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt: holds what DeepSpeed does not store"):
        zerofiles.load(tmp_path / "bad.pt")
    assert not (tmp_path / "planted").exists()
