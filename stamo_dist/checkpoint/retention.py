"""The folder of a run's checkpoints: listing, retention, and removal.

Complete checkpoints are found by their manifests, not by a link. Incomplete ones are removed; damaged ones are renamed
to `corrupt_step_…` and left to the user.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stamo_dist.checkpoint.manifest import (
    MANIFEST,
    Checkpoint,
    ForeignFormatError,
    UnfinishedError,
    read_checkpoint_manifest,
)
from stamo_dist.errors import CheckpointError
from stamo_dist.recipe.training import CheckpointConfig
from stamo_dist.run.success import Successes

_log = logging.getLogger(__name__)
_DISCARDED = ".discarded"
_PART = re.compile(r"\.step_\d+.*?(?:\.g(\d+))?\.tmp")


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def part_of(checkpoints: Path, step: int, lease: int) -> Path:
    """The temporary folder of a checkpoint that is being written; unique to a start of a run."""
    return checkpoints / f".step_{step:08d}.g{lease}.tmp"


@dataclass
class Found:
    """The content of a folder of checkpoints, newest first."""

    whole: list[Checkpoint]
    corrupt: list[tuple[Path, str]]  # and why
    unfinished: list[Path]
    foreign: list[tuple[Path, str]]  # of another format

    def __str__(self) -> str:
        return ", ".join(path.name for path, _ in self.whole) or "none"


def scan(checkpoints: Path) -> Found:
    """Read every checkpoint's manifest, and compare names and sizes of its files."""
    found = Found([], [], [], [])
    for path in sorted(checkpoints.glob("step_*"), reverse=True):
        try:
            found.whole.append(Checkpoint(path, read_checkpoint_manifest(path)))
        except UnfinishedError:
            found.unfinished.append(path)
        except ForeignFormatError as e:
            found.foreign.append((path, str(e)))
        except CheckpointError as e:
            found.corrupt.append((path, str(e)))
    return found


def complete(checkpoints: Path) -> tuple[list[Path], list[str]]:
    """The loadable checkpoints, newest first, and the reasons why others are not."""
    found = scan(checkpoints)
    why = [f"{path}: no {MANIFEST}, so it was never completed" for path in found.unfinished]
    return [path for path, _ in found.whole], why + [reason for _, reason in found.corrupt + found.foreign]


def leftovers(checkpoints: Path, lease: int) -> list[Path]:
    """Folders that earlier starts left half-written or half-removed."""
    parts = [(p, _PART.fullmatch(p.name)) for p in checkpoints.glob(".step_*.tmp")]
    unfinished = [p for p in checkpoints.glob("step_*") if not (p / MANIFEST).exists()]
    return unfinished + [p for p, m in parts if m and int(m[1] or 0) < lease]


def clean(checkpoints: Path, lease: int) -> list[str]:
    """Remove the leftovers of earlier starts; returns notes for the user."""
    found = leftovers(checkpoints, lease)
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    gone = [path for path in found if not path.exists()]
    return [f"removed {path}: it was never completed" for path in gone if _DISCARDED not in path.name]


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint so that it is never loaded again; returns its new path."""
    names: Iterator[str] = (f"{why}_{path.name}{f'.{n}' if n else ''}" for n in range(10_000))
    new = next(p for p in map(path.with_name, names) if not p.exists())
    path.rename(new)
    return new


def discard(path: Path, lease: int) -> Path | None:
    """Invalidate a checkpoint by renaming its folder; returns the new path, whose files can be removed later."""
    new = path.with_name(f".{path.name.lstrip('.')}{_DISCARDED}.g{lease}.tmp")
    try:
        path.rename(new)
    except OSError as e:
        _log.warning("%s: not needed any more, but could not be removed (%s)", path, e.strerror)
        return None
    return new


def named(checkpoints: Path, name: str) -> Path:
    """The checkpoint that the user names: best (by success in closed loop), a step, or a path.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    path = Path(name)
    if name == "best":
        best = Successes.read(checkpoints.parent).best
        if best is None:
            raise CheckpointError(
                f"best: {checkpoints.parent} has measured no success while it trained (evaluate.rollout in the recipe)"
            )
        path = folder_of(checkpoints, best.step)
    elif name.isdecimal():
        path = folder_of(checkpoints, int(name))
    if not path.is_dir():
        steps = ", ".join(p.name for p in complete(checkpoints)[0]) or "none"
        raise CheckpointError(f"{name}: there is no {path}; the run's checkpoints: {steps}")
    return path


def superseded(whole: Sequence[Checkpoint], policy: CheckpointConfig, needed: Collection[int] = ()) -> list[Path]:
    """The checkpoints, given newest first, that are no longer needed.

    Kept are the newest `keep` regular ones, those of every `keep_every`-th step, the newest temporary one while it is
    newer than the oldest regular one kept, and those of the steps `needed`.
    """
    kept = [manifest.state.step for _, manifest in whole if manifest.kind == "regular"][: policy.keep]
    temporary = [manifest.state.step for _, manifest in whole if manifest.kind == "temporary"]
    if temporary and (len(kept) < policy.keep or temporary[0] > kept[-1]):
        kept.append(temporary[0])
    return [
        path
        for path, manifest in whole
        if manifest.state.step not in {*kept, *needed}
        and not (policy.keep_every and manifest.state.step % policy.keep_every == 0)
    ]


def sync_tree(folder: Path) -> None:
    """fsync the folders below `folder`, so that file names are durable; the contents already are."""
    for path, _, _ in os.walk(folder):
        sync(Path(path))


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
