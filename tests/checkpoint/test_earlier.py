"""No code runs when a checkpoint of an earlier format is read."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from stamo_dist.checkpoint.earlier import DcpSource, load_deepspeed
from stamo_dist.errors import CheckpointError


class Planted:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def test_foreign_pickles_are_refused(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    torch.save({"scaler": LossScaler(2.0), "weights": torch.arange(3)}, tmp_path / "good.pt")
    read = load_deepspeed(tmp_path / "good.pt")
    assert read["scaler"].loss_scale == 2.0
    assert read["weights"].tolist() == [0, 1, 2]
    torch.save({"scaler": Planted(tmp_path / "planted")}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt: holds what DeepSpeed does not store"):
        load_deepspeed(tmp_path / "bad.pt")
    assert not (tmp_path / "planted").exists()


def test_an_index_of_pytorch_makes_no_other_classes(tmp_path):
    (tmp_path / "dcp").mkdir()
    for planted in (Planted(tmp_path / "planted"), Metadata({"w": Planted(tmp_path / "planted")})):
        (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(planted))
        with pytest.raises(
            CheckpointError, match=r"\.metadata: holds what PyTorch does not store there \(posix\.mkdir\)"
        ):
            DcpSource(tmp_path)
    for torn in (b"", pickle.dumps(Metadata({}))[:-9], pickle.dumps({1: 2})):
        (tmp_path / "dcp/.metadata").write_bytes(torn)
        with pytest.raises(CheckpointError, match=r"\.metadata: "):
            DcpSource(tmp_path)
    assert not (tmp_path / "planted").exists()
