"""From any dataset to shards: the part all formats share.

A format is a Reader: it scans a source for its episodes, cheaply and with every problem at once, and reads one episode
at a time. The driver splits the episodes, cuts each split into slices of whole episodes, converts the slices (in
processes, and runs, of their own) and puts them together as stamo_dist/data/schema.py describes.

The result depends on the source and the options alone. Everything is written under `.NAME.partial` beside OUT; a slice
is complete once its folder has its final name, and OUT is created by one rename. A killed conversion continues after
its last complete slice and gives the same bytes. Any number of runs may work on one OUT at a time.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.convert.folder import ConversionOutcome, run_plan
from data_tools.convert.plan import Settings, make_plan
from data_tools.convert.publish import run_and_publish
from data_tools.stores.sources import bring, is_remote
from stamo_dist.data.schema import Manifest
from stamo_dist.errors import DataError


def convert(format: str, src: Path | str, out: Path | str, **settings: Any) -> tuple[Manifest, bool]:
    """Convert all of SRC into shards in OUT in this process's own run; see `run`. Keywords: the fields of `Settings`.

    Returns:
        The manifest, and whether anything was done (False: OUT was complete already).
    """
    outcome = run(format, src, out, replace(Settings(**settings), num_slices=1, slice=0))
    assert outcome.manifest is not None
    return outcome.manifest, outcome.done


def run(format: str, src: Path | str, out: Path | str, settings: Settings) -> ConversionOutcome:
    """Convert this run's share of SRC; the run that finds all shares done assembles OUT.

    Args:
        format: One of data_tools/formats/registry.py.
        src: File or folder of the source dataset; or its URL, which `stores.sources.bring` copies here.
        out: Folder to create, or a URL to upload it to.
        settings: See `Settings`.

    Raises:
        DataError: Settings, source or output that cannot be used, all problems at once.
    """
    src = _local_source(src, settings)
    if "://" in str(out):
        return run_and_publish(format, src, str(out), settings)
    out = Path(out)
    _check_apart(src, out)
    plan = make_plan(format, src, settings.name or out.resolve().name, settings)
    return run_plan(plan, out, settings)


def _check_apart(src: Path, out: Path) -> None:
    """Refuse an OUT among the files of SRC, which the next scan would take for data, and one that holds SRC."""
    raw, shards = src.resolve(), out.resolve()
    if shards.is_relative_to(raw) or raw.is_relative_to(shards):
        where = "is SRC" if raw == shards else "lies in SRC" if shards.is_relative_to(raw) else "holds SRC"
        raise DataError(f"out: {out} {where} ({src}); give a folder beside it, e.g. {raw.parent / 'shards' / raw.name}")


def _local_source(src: Path | str, settings: Settings) -> Path:
    """The local path of the source; reports what was copied to this machine."""
    if isinstance(src, Path) or not is_remote(src):
        return Path(src)
    settings.check()
    brought = bring(src, settings.work and settings.work / "sources", settings.quiet)
    if not settings.quiet:
        print(brought, file=sys.stderr)
    return brought.path
