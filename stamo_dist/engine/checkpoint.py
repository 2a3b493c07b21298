"""Checkpoints that are whole or not there.

A checkpoint is `checkpoints/step_00000123/`: written under a temporary name, synced, renamed, and marked last with
`checkpoint.json`, which lists every file with its size. A folder without a valid marker is never loaded. The newest is
found by scanning.

ddp, fsdp and hsdp write PyTorch's distributed checkpoint format, which reshards by itself; ZeRO writes
DeepSpeed's files.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from stamo_dist.engine.dcp import read_dcp
from stamo_dist.engine.ema import EMA
from stamo_dist.engine.processes import barrier
from stamo_dist.engine.strategy import ZERO_STAGE, Engine
from stamo_dist.errors import CheckpointError, RunError

FORMAT_VERSION = 1
MARKER = "checkpoint.json"
_TAG = "zero"


@dataclass
class RunState:
    """Where a run stands after an optimizer step."""

    step: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)  # seen so far, per source
    seconds: float = 0.0  # of training, over all restarts


@dataclass
class Marker:
    """checkpoint.json."""

    state: RunState
    strategy: str
    world_size: int
    precision: str
    fingerprint: str  # of the mixture
    files: dict[str, int]  # relative path → bytes
    git_commit: str | None = None
    format_version: int = FORMAT_VERSION


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def read_marker(path: Path) -> Marker:
    """Read and check the marker of one checkpoint.

    Raises:
        CheckpointError: No marker, another format, or files missing or of another size.
    """
    try:
        raw = json.loads((path / MARKER).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: no valid {MARKER}, so it was never completed") from None
    if raw.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {raw.get('format_version')}; this version of stamo reads {FORMAT_VERSION}"
        )
    marker = Marker(**{**raw, "state": RunState(**raw["state"])})
    bad = [n for n, size in marker.files.items() if not (path / n).is_file() or (path / n).stat().st_size != size]
    if bad:
        raise CheckpointError(f"{path}: missing or truncated: {', '.join(sorted(bad))}")
    return marker


def complete(checkpoints: Path) -> tuple[list[Path], list[str]]:
    """The loadable checkpoints, newest first, and why others are not."""
    good, why = [], []
    for path in sorted(checkpoints.glob("step_????????"), reverse=True):
        try:
            read_marker(path)
            good.append(path)
        except CheckpointError as e:
            why.append(str(e))
    return good, why


def choose(checkpoints: Path, resume: str, fingerprint: str | None) -> tuple[Path | None, list[str]]:
    """The checkpoint a run starts from, None for a fresh start, and what a person should know about the choice.

    Args:
        checkpoints: The run's own checkpoints.
        resume: "auto": the newest whole one; "none": none may be there; else the path of a checkpoint or a run.
        fingerprint: Of the mixture that the checkpoint must have been trained on; None accepts any.

    Raises:
        RunError: "none" in a folder with checkpoints, a run without any, or another mixture.
        CheckpointError: The named checkpoint is not whole.
    """
    if resume not in ("auto", "none"):
        path = Path(resume)
        if not (path / "checkpoints").is_dir():
            read_marker(path)
            good, broken = [path], list[str]()
        else:
            good, broken = complete(path / "checkpoints")
            if not good:
                raise RunError(f"--resume {resume}: the run holds no whole checkpoint")
    else:
        good, broken = complete(checkpoints)
        if good and resume == "none":
            raise RunError(f"{checkpoints}: holds {good[0].name}; choose another run_dir or --resume auto")
    if good and fingerprint is not None and read_marker(good[0]).fingerprint != fingerprint:
        raise RunError(
            f"{good[0]}: was trained on another mixture (data.sources, weights, shards, seed or batch changed); "
            "restore the recipe, choose another run_dir, or pass --allow-changed-data"
        )
    return (good[0] if good else None), [f"skipped {b}" for b in broken]


def save(
    checkpoints: Path, engine: Engine, ema: EMA | None, state: RunState, *, fingerprint: str, precision: str,
    keep: int, git_commit: str | None = None,
) -> Path:  # fmt: skip
    """Write the checkpoint of `state.step`; every process calls it. Returns its folder."""
    final = folder_of(checkpoints, state.step)
    tmp = checkpoints / f".{final.name}.tmp"
    if engine.world.is_main:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # an unmarked or superseded leftover
        tmp.mkdir(parents=True)
    barrier()
    if engine.is_zero:
        engine.deepspeed.save_checkpoint(str(tmp), tag=_TAG, save_latest=False)
    else:
        module, optimizer = get_state_dict(engine.unwrapped, _inner(engine))
        dcp.save({"module": module, "optimizer": optimizer}, checkpoint_id=tmp / "dcp")
    if ema is not None:
        ema.save(tmp / "ema")
    barrier()
    if engine.world.is_main:
        files = {str(p.relative_to(tmp)): p.stat().st_size for p in sorted(tmp.rglob("*")) if p.is_file()}
        for name in files:
            _fsync(tmp / name)
        tmp.rename(final)
        marker = Marker(state, engine.strategy, engine.world.size, precision, fingerprint, files, git_commit)
        part = final / f".{MARKER}.tmp"
        part.write_text(json.dumps(asdict(marker), indent=1))
        _fsync(part)
        part.rename(final / MARKER)
        _fsync(final)
        _fsync(checkpoints)
        for old in complete(checkpoints)[0][keep:]:
            (old / MARKER).unlink()
            shutil.rmtree(old)
    barrier()
    return final


def load(path: Path, engine: Engine, ema: EMA | None, *, precision: str) -> RunState:
    """Load weights, optimizer and average from `path` into the running engine; every process calls it.

    Raises:
        CheckpointError: The checkpoint is incomplete or was written by a strategy, precision or number of processes
            that this run cannot read.
    """
    marker = read_marker(path)
    if marker.precision != precision:
        raise CheckpointError(f"{path}: saved in {marker.precision}, the recipe says {precision}; set train.precision")
    if engine.is_zero or marker.strategy in ZERO_STAGE:
        if (marker.strategy, marker.world_size) != (engine.strategy, engine.world.size):
            raise CheckpointError(
                f"{path}: written by {marker.strategy} with world size {marker.world_size} and cannot continue as "
                f"{engine.strategy} with world size {engine.world.size}; run it as it was saved, or use ddp, fsdp or "
                "hsdp, which continue on any number of processes"
            )
        loaded, _ = engine.deepspeed.load_checkpoint(str(path), tag=_TAG)
        if loaded is None:
            raise CheckpointError(f"{path}: DeepSpeed could not read it")
    else:
        module, optimizer = get_state_dict(engine.unwrapped, _inner(engine))
        dcp.load({"module": module, "optimizer": optimizer}, checkpoint_id=path / "dcp")
        set_state_dict(
            engine.unwrapped, _inner(engine), model_state_dict=module, optim_state_dict=optimizer,
            options=StateDictOptions(strict=True),
        )  # fmt: skip
    if ema is not None:
        ema.load(path / "ema")
    return marker.state


def read_weights(path: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The trained module's full fp32 state dict from one checkpoint, without a process group.

    `ema`: with the moving average in place of the trained parameters, where the checkpoint holds one.
    """
    if read_marker(path).strategy in ZERO_STAGE:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # it reports every step of its work
            weights = dict(get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_TAG))
    else:
        weights = read_dcp(path / "dcp", "module")
    if ema and (path / "ema").is_dir():
        weights.update(EMA.read(path / "ema"))
    return weights


def _inner(engine: Engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
