"""Which checkpoints a running start keeps, by what it remembers of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from stamo_dist.checkpoint import save as saving
from stamo_dist.checkpoint.compatibility import RunFingerprint
from stamo_dist.checkpoint.retention import clean, part_of
from stamo_dist.checkpoint.save import Origin, Saved, Saver
from stamo_dist.distributed.engine import Engine
from stamo_dist.distributed.rank import World
from stamo_dist.recipe.training import CheckpointConfig
from stamo_dist.run.state import RunState


@pytest.fixture
def saver(tmp_path) -> Saver:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    engine = Engine("ddp", World(0, 1, 0, 1), cast(Any, None), module, optimizer, None)
    policy = CheckpointConfig(every=1, keep=2)
    return Saver(tmp_path / "checkpoints", engine, None, policy, Origin(RunFingerprint("", {}), "fp32"))


def save(saver: Saver, step: int) -> Saved:
    (ended,) = saver.save(RunState(step), "regular", wait=True)
    return ended


def names(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "checkpoints").iterdir())


def test_the_folder_is_looked_at_once(saver, tmp_path, monkeypatch):
    looks = []
    scan = saving.scan
    monkeypatch.setattr(saving, "scan", lambda folder: looks.append(folder) or scan(folder))
    for step in (1, 2, 3, 4):
        assert save(saver, step).error is None
    saver.close()
    assert names(tmp_path) == ["step_00000003", "step_00000004"]
    assert len(looks) == 1
    (tmp_path / "checkpoints/step_00000004").rename(tmp_path / "checkpoints/abandoned_step_00000004")
    assert save(saver, 5).error is None
    saver.close()
    assert names(tmp_path) == ["abandoned_step_00000004", "step_00000003", "step_00000005"]


def test_nothing_is_removed_for_one_that_failed(saver, tmp_path):
    for step in (1, 2):
        save(saver, step)
    in_the_way = part_of(tmp_path / "checkpoints", 3, 0)
    in_the_way.write_text("no folder")
    assert "File exists" in str(save(saver, 3).error)
    saver.close()
    assert names(tmp_path) == [in_the_way.name, "step_00000001", "step_00000002"]
    in_the_way.unlink()
    assert save(saver, 4).error is None
    saver.close()
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_what_was_not_removed_in_time_goes_at_the_next_start(saver, tmp_path, monkeypatch):
    """A start that ends while it removes leaves no folder that looks like a checkpoint."""
    monkeypatch.setattr(saving.shutil, "rmtree", lambda path, ignore_errors: None)
    for step in (1, 2, 3):
        save(saver, step)
    saver.close()
    monkeypatch.undo()
    assert names(tmp_path) == [".step_00000001.discarded.g0.tmp", "step_00000002", "step_00000003"]
    assert clean(tmp_path / "checkpoints", lease=1) == []
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
