"""Converting a plan into a folder: whole slices under `.NAME.partial`, then OUT by one rename."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.convert import slices
from data_tools.convert.growth import only_new
from data_tools.convert.merge import merge, put_in_place
from data_tools.convert.plan import ConversionPlan, Settings, check_bad, split_episodes
from data_tools.stores.store import sha256_of
from stamo_dist.data.at_hand import damage
from stamo_dist.data.schema import MANIFEST, Manifest, has_shards, partial_of, read_manifest
from stamo_dist.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConversionOutcome:
    """The result of a run.

    Attributes:
        manifest: OUT's manifest; None while slices of other runs are missing.
        done: Whether this run did anything (False: OUT was complete already).
        missing: Names of the slices that other runs have still to convert.
    """

    manifest: Manifest | None
    done: bool
    missing: list[str] = field(default_factory=list)


def run_plan(plan: ConversionPlan, out: Path, settings: Settings) -> ConversionOutcome:
    """Convert this run's share of a plan into the folder OUT."""
    partial = partial_of(out)
    with _exclusive(out):
        existing = _existing(out, plan.manifest, settings.overwrite)
        if existing is not None and existing.source_fingerprint == plan.manifest.source_fingerprint:
            _discard(partial, plan)
            return ConversionOutcome(existing, False)
        if existing is not None:
            plan = only_new(plan, out, existing, settings)
        if existing is not None and not plan.splits:
            return ConversionOutcome(merge(out, plan.manifest, [], plan.bad, existing), False)
        _prepare(partial, out, plan)

    work = plan.slices(partial)
    share = [part for number, part in enumerate(work) if number % settings.num_slices == settings.slice]
    bad = list(plan.bad)
    try:
        for reasons in slices.run(plan.job, share, settings.processes, settings.quiet):
            bad += reasons
            check_bad(bad, settings.max_bad)
    except DataError:
        # Another run may have put OUT together meanwhile.
        if not _is_whole(out, plan, read=settings.overwrite):
            raise

    with _exclusive(out):
        if _is_whole(out, plan, read=settings.overwrite):
            _discard(partial, plan)
            return ConversionOutcome(read_manifest(out), True)
        if missing := [part.folder.name for part in work if part.report() is None]:
            return ConversionOutcome(None, True, missing)
        bad = [*plan.bad, *(reason for part in work for reason in (part.report() or {})["skipped"])]
        check_bad(bad, settings.max_bad)
        lost = _unreadable_splits(plan, work)
        why = [f"split {s}: none of the {len(plan.splits[s])} episodes chosen could be read" for s in lost]
        notes = [*plan.manifest.notes, *why]
        plan = replace(plan, manifest=plan.manifest.model_copy(update={"notes": notes}))
        if lost and (other := _split_again(plan, work, settings)) is not None:
            plan, work = other, other.slices(partial, "again-")
            for _ in slices.run(plan.job, work, settings.processes, settings.quiet):
                pass
        if plan.base is not None:
            if read_manifest(out) != plan.base:
                raise DataError(f"{out}: was changed while it was added to; run again")
            manifest = merge(out, plan.manifest, work, plan.bad, plan.base)
        else:
            whole = partial / "whole"
            shutil.rmtree(whole, ignore_errors=True)
            manifest = merge(whole, plan.manifest, work, plan.bad)
            put_in_place(whole, out)
        shutil.rmtree(partial, ignore_errors=True)
    return ConversionOutcome(manifest, True)


def _unreadable_splits(plan: ConversionPlan, work: Sequence[slices.Slice]) -> list[str]:
    """The splits none of whose episodes could be read."""
    read = {part.split for part in work if (part.report() or {"episodes": []})["episodes"]}
    return [split for split in plan.splits if split not in read]


def _split_again(plan: ConversionPlan, work: Sequence[slices.Slice], settings: Settings) -> ConversionPlan | None:
    """Split the readable episodes anew, because one split has turned out to have none."""
    reports = [part.report() or {} for part in work]
    read = {e["id"] for report in reports for e in report["episodes"]}
    if plan.base or settings.split_by != "hash" or not settings.val_fraction or not read:
        return None
    splits, notes = split_episodes([e for e in plan.episodes if e.id in read], settings)
    skipped = [reason for report in reports for reason in report["skipped"]]
    manifest = plan.manifest.model_copy(update={"notes": [*plan.manifest.notes, *notes]})
    return replace(plan, manifest=manifest, splits=splits, bad=[*plan.bad, *skipped])


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Inside, no other run prepares or assembles the same OUT."""
    lock = out.parent / f".{out.name}.lock"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with slices.held(lock, -1):
            try:
                yield
            finally:
                if not partial_of(out).exists():  # a run that still waits for the lock finds OUT complete
                    lock.unlink(missing_ok=True)
    except OSError as e:
        raise DataError(slices.cannot_write(out, e)) from e


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


def check_same(where: str, found: Manifest, plan: Manifest, but: Collection[str] = ()) -> None:
    """Raises:
    DataError: `found` differs from the plan's conversion in fields other than `but`; names them.
    """
    old, new = ({k: v for k, v in identity(m).items() if k not in but} for m in (found, plan))
    if old == new:
        return
    lines = [f"{where}: already converted, but with another"]
    for key in old:
        if key == "options":
            changed = sorted(k for k in {**old[key], **new[key]} if old[key].get(k) != new[key].get(k))
            lines += [f"  - {k}: {old[key].get(k)} (asked: {new[key].get(k)})" for k in changed]
        elif key == "source_fingerprint" and old[key] != new[key]:
            lines.append(
                "  - the dataset's files have changed since; what is new can be added in a folder, and "
                "`stamo data sync FOLDER URL` sends that"
            )
        elif old[key] != new[key]:
            lines.append(f"  - {key}: {old[key]} (asked: {new[key]})")
    raise DataError("\n".join([*lines, "choose another OUT, or replace it with --overwrite"]))


def _is_whole(out: Path, plan: ConversionPlan, *, read: bool) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    found = read_manifest(out)
    return identity(found) == identity(plan.manifest) and not _damaged(out, found, read=read)


def _damaged(out: Path, manifest: Manifest, *, read: bool) -> list[str]:
    """Files of OUT that are missing or of another size than was written; `read`: also those of another content."""
    wrong = [line for split in manifest.splits for line in damage(out, manifest, split, manifest.cameras, every=True)]
    if read and not wrong:
        wrong = [name for name, expected in manifest.checksums.items() if sha256_of(out / name) != expected]
    return wrong


def _existing(out: Path, plan: Manifest, overwrite: bool) -> Manifest | None:
    """The manifest in OUT if it is what the plan would give, or gave before the dataset changed; None if OUT is free or
    may be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        if not has_shards(out):
            raise DataError(f"{out}: exists and was not written by `stamo data convert`; choose another OUT")
        if not overwrite:
            raise DataError(f"{out}: has shards but no {MANIFEST}; choose another OUT, or replace it with --overwrite")
        return None
    try:
        found = read_manifest(out)
        check_same(str(out), found, plan, but=() if overwrite else ("source_fingerprint",))
    except DataError:
        if overwrite:
            return None
        raise
    wrong = _damaged(out, found, read=overwrite)
    if wrong and not overwrite and (found.before or found.source_fingerprint != plan.source_fingerprint):
        raise DataError(
            f"{wrong[0]}\n{out}: it, or the dataset, has grown or changed since it was converted: only --overwrite "
            "converts all of it anew"
        )
    if wrong:
        _log.warning("%s: damaged, so it is converted anew: %s", out, wrong[0].partition(";")[0])
    return None if wrong else found


def _prepare(partial: Path, out: Path, plan: ConversionPlan) -> None:
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


def _is_of(stamp: Path, plan: ConversionPlan) -> bool:
    return json.loads(stamp.read_text()) == _stamp(plan)


def _stamp(plan: ConversionPlan) -> dict[str, Any]:
    base = [plan.base.source_fingerprint, len(plan.base.before)] if plan.base else None
    return {**identity(plan.manifest), "tool_version": plan.manifest.tool_version, "adds_to": base}


def _discard(partial: Path, plan: ConversionPlan) -> None:
    """Remove the slices of a plan whose OUT is complete, but not those of another plan that will replace it."""
    stamp = partial / slices.STAMP
    if not stamp.is_file() or json.loads(stamp.read_text()).items() >= identity(plan.manifest).items():
        shutil.rmtree(partial, ignore_errors=True)


def _is_held(path: Path) -> bool:
    with slices.held(path, 0) as free:
        return not free
