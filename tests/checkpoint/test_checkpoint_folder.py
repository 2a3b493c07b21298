"""What counts as a checkpoint, which ones stay, and that a copy in host memory is what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stamo_dist.checkpoint.manifest import MANIFEST, CheckpointManifest, Stored, damage, read_checkpoint_manifest
from stamo_dist.checkpoint.retention import clean, complete, folder_of, named, part_of, scan, superseded
from stamo_dist.checkpoint.select import select_checkpoint
from stamo_dist.checkpoint.source import StateSource
from stamo_dist.checkpoint.staging import Staging
from stamo_dist.checkpoint.state_writer import STATE, StateWriter
from stamo_dist.device import CPU
from stamo_dist.distributed.ranges import WEIGHT, Range
from stamo_dist.distributed.rank import World
from stamo_dist.errors import CheckpointError
from stamo_dist.recipe.training import CheckpointConfig
from stamo_dist.run.state import RunState
from stamo_dist.run.success import Success, Successes


def write(checkpoints: Path, step: int, kind: str = "regular") -> Path:
    """A checkpoint that holds the tensor `step`."""
    folder = folder_of(checkpoints, step)
    files: dict[str, Stored] = {}
    held = [Range("w", 0, 50, {WEIGHT: torch.full((50,), float(step))})]
    writer = StateWriter(World(0, 1, 0, 1), held, {"w": (50,)}, {}, None)
    writer.write(folder, files)
    writer.finish(folder, files)
    state = RunState(step, cursor={"samples": 8 * step}, samples=[5, 3])
    (folder / MANIFEST).write_text(CheckpointManifest(state, "ddp", 1, "fp32", "f", files, kind=kind).text())
    return folder


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    folder = write(tmp_path, 3)
    marker = read_checkpoint_manifest(folder)
    assert marker.state == RunState(3, {"samples": 24}, [5, 3])
    assert set(marker.files) == {"state/index.json", "state/pieces.npy", "state/00000.safetensors"}
    assert damage(folder, marker) == []
    for name in [*marker.files, MANIFEST]:
        whole = (folder / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            if name == MANIFEST:
                with pytest.raises(CheckpointError):
                    read_checkpoint_manifest(folder)
            else:
                assert damage(folder, read_checkpoint_manifest(folder)) == [name], at
        (folder / name).write_bytes(whole)
    assert damage(folder, marker, 0, 2) + damage(folder, marker, 1, 2) == []


@pytest.mark.parametrize(
    ("policy", "kinds", "gone"),
    [
        ({"keep": 2}, "rrrr", [1, 2]),
        ({"keep": 1, "keep_every": 2}, "rrrrr", [1, 3]),
        ({"keep": 2}, "trtrt", [1, 3]),  # of the temporary ones the newest
        ({"keep": 2}, "rtrr", [1, 2]),  # older than all regular ones kept
        ({"keep": 3}, "trr", []),
        ({"keep": 1}, "ttt", [1, 2]),
    ],
)
def test_retention(tmp_path, policy, kinds, gone):
    for step, kind in enumerate(kinds, 1):
        write(tmp_path, step, "regular" if kind == "r" else "temporary")
    removed = superseded(scan(tmp_path).whole, CheckpointConfig(**policy))
    assert sorted(int(p.name[5:]) for p in removed) == gone


def test_the_best_has_a_name_and_stays(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="has measured no success while it trained"):
        named(checkpoints, "best")
    for step in (1, 2, 3):
        write(checkpoints, step)
    Successes(best=Success(1, 70, 40, 89, 10)).write(tmp_path)
    assert named(checkpoints, "best") == select_checkpoint(checkpoints, "best").path == folder_of(checkpoints, 1)
    assert named(checkpoints, "3") == folder_of(checkpoints, 3)
    assert superseded(scan(checkpoints).whole, CheckpointConfig(keep=1), {1}) == [folder_of(checkpoints, 2)]
    with pytest.raises(CheckpointError, match=r"4: there is no .*the run's checkpoints: step_00000003, step_00000002"):
        named(checkpoints, "4")


def test_leftovers_are_cleaned_up_and_the_newest_is_found_by_looking(tmp_path):
    write(tmp_path, 10)
    newest = write(tmp_path, 20)
    (write(tmp_path, 30) / MANIFEST).unlink()
    for leftover in (".step_00000040.g2.tmp", ".step_00000040.tmp", ".step_00000050.g3.tmp"):
        (tmp_path / leftover / STATE).mkdir(parents=True)
    assert part_of(tmp_path, 50, 3).is_dir()
    assert complete(tmp_path)[0][0] == newest
    assert len(clean(tmp_path, lease=3)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [".step_00000050.g3.tmp", "step_00000010", "step_00000020"]


def test_what_is_staged_is_what_is_written(tmp_path):
    """Training goes on while the copy is on its way to the disk."""
    model = torch.nn.Linear(30, 20)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    held = [Range(n, 0, p.numel(), {WEIGHT: p.detach()}) for n, p in model.named_parameters()]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    writer = StateWriter(World(0, 1, 0, 1), held, shapes, {}, Staging(CPU))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    files: dict[str, Stored] = {}
    writer.write(tmp_path, files)
    writer.finish(tmp_path, files)
    saved = StateSource(tmp_path / STATE).whole(WEIGHT)
    assert all(torch.equal(saved[k], before[k]) for k in before)
