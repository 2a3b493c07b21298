"""Converting a plan into a folder: whole slices under `.NAME.partial`, then OUT by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.convert import slices
from data_tools.convert.merge import merge, put_in_place
from data_tools.convert.plan import Plan, Settings, check_bad
from stamo_dist.data.schema import MANIFEST, Manifest, read_manifest
from stamo_dist.errors import DataError


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        manifest: Of OUT; None while slices of other runs are missing.
        done: Whether this run did anything (False: OUT was whole already).
        missing: Names of the slices that other runs have still to convert.
    """

    manifest: Manifest | None
    done: bool
    missing: list[str] = field(default_factory=list)


def run_plan(plan: Plan, out: Path, settings: Settings) -> Outcome:
    """Convert this run's share of a plan into the folder OUT."""
    partial = _partial(out)
    with _alone(out):
        if (existing := _existing(out, plan.manifest, settings.overwrite)) is not None:
            _discard(partial, plan.manifest)
            return Outcome(existing, False)
        _prepare(partial, out, plan.manifest)

    work = plan.slices(partial)
    share = [part for number, part in enumerate(work) if number % settings.num_slices == settings.slice]
    bad = list(plan.bad)
    try:
        for reasons in slices.run(plan.job, share, settings.processes, settings.quiet):
            bad += reasons
            check_bad(bad, settings.max_bad)
    except DataError:
        # Another run may have put OUT together meanwhile.
        if not _is_whole(out, plan.manifest):
            raise

    with _alone(out):
        if _is_whole(out, plan.manifest):
            _discard(partial, plan.manifest)
            return Outcome(read_manifest(out), True)
        if missing := [part.folder.name for part in work if part.report() is None]:
            return Outcome(None, True, missing)
        bad = [*plan.bad, *(reason for part in work for reason in (part.report() or {})["skipped"])]
        check_bad(bad, settings.max_bad)
        whole = partial / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        manifest = merge(whole, plan.manifest, work, plan.bad)
        put_in_place(whole, out)
        shutil.rmtree(partial, ignore_errors=True)
    return Outcome(manifest, True)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No other run prepares, or puts together, the same OUT."""
    lock = out.parent / f".{out.name}.lock"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with slices.held(lock, -1):
            try:
                yield
            finally:
                if not _partial(out).exists():  # who still waits for the lock finds OUT whole
                    lock.unlink(missing_ok=True)
    except OSError as e:
        raise DataError(slices.cannot_write(out, e)) from e


def _partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


_IDENTITY = (
    "name",
    "source_format",
    "image_size",
    "cameras",
    "convention",
    "options",
    "source_fingerprint",
    "format_version",
)


def identity(manifest: Manifest) -> dict[str, Any]:
    """What must be equal for two conversions to give the same shards."""
    dumped = json.loads(manifest.model_dump_json())
    return {key: dumped[key] for key in _IDENTITY}


def check_same(where: str, found: Manifest, plan: Manifest) -> None:
    """Raises:
    DataError: `found` is another conversion than the plan's; says what differs.
    """
    old, new = identity(found), identity(plan)
    if old == new:
        return
    lines = [f"{where}: already converted, but with another"]
    for key in _IDENTITY:
        if key == "options":
            changed = sorted(k for k in {**old[key], **new[key]} if old[key].get(k) != new[key].get(k))
            lines += [f"  - {k}: {old[key].get(k)} (asked: {new[key].get(k)})" for k in changed]
        elif old[key] != new[key]:
            lines.append(f"  - {key}: {old[key]} (asked: {new[key]})")
    raise DataError("\n".join([*lines, "choose another OUT, or replace it with --overwrite"]))


def _is_whole(out: Path, plan: Manifest) -> bool:
    return (out / MANIFEST).is_file() and identity(read_manifest(out)) == identity(plan)


def _existing(out: Path, plan: Manifest, overwrite: bool) -> Manifest | None:
    """The manifest in OUT if it is what the plan would give; None if OUT is free or may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out}: exists and was not written by `stamo data convert`; choose another OUT")
    try:
        found = read_manifest(out)
        check_same(str(out), found, plan)
    except DataError:
        if overwrite:
            return None
        raise
    return found


def _prepare(partial: Path, out: Path, plan: Manifest) -> None:
    """Make the folder of slices; keep what other runs of the same plan left or are writing, drop anything else."""
    stamp = partial / slices.STAMP
    if partial.exists() and (not stamp.is_file() or not _is_of(stamp, plan)):
        if any(_is_held(path) for path in partial.glob("*.lock")):
            raise DataError(f"{out}: another conversion, with other options or of other files, is writing it right now")
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    if not stamp.is_file():
        temporary = stamp.with_suffix(".tmp")
        temporary.write_text(json.dumps(_stamp(plan), sort_keys=True))
        os.replace(temporary, stamp)


def _is_of(stamp: Path, plan: Manifest) -> bool:
    return json.loads(stamp.read_text()) == _stamp(plan)


def _stamp(plan: Manifest) -> dict[str, Any]:
    return {**identity(plan), "tool_version": plan.tool_version}


def _discard(partial: Path, plan: Manifest) -> None:
    """Remove the slices of a plan whose OUT is whole, but not those of another plan that is to replace it."""
    stamp = partial / slices.STAMP
    if not stamp.is_file() or _is_of(stamp, plan):
        shutil.rmtree(partial, ignore_errors=True)


def _is_held(path: Path) -> bool:
    with slices.held(path, 0) as free:
        return not free
