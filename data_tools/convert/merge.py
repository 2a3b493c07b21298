"""Merging slices into one source: tables are joined, shards renumbered, and the manifest is written last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.convert.slices import Slice
from stamo_dist.data.agreement import describing, prefix_of
from stamo_dist.data.confined import check_index
from stamo_dist.data.schema import EPISODES, MANIFEST, Episode, Manifest, Size, Split, first_entries
from stamo_dist.errors import DataError


def merge(
    whole: Path, plan: Manifest, work: Sequence[Slice], bad: Sequence[str], base: Manifest | None = None
) -> Manifest:
    """Assemble complete slices as one source in the new folder `whole`, or add them to the source there.

    Args:
        whole: Folder to create, or the source.
        plan: The conversion plan, with the manifest fields known in advance.
        work: The folder of all slices.
        bad: Episodes that were not attempted, as "EPISODE: reason".
        base: Manifest of the existing source. Processes that read by it are not affected at any time.

    Raises:
        DataError: No episode is left, or a slice was damaged since it was written.
    """
    reports = {part: part.report() or {} for part in work}
    skipped = sorted([*bad, *(reason for report in reports.values() for reason in report["skipped"])])
    if damaged := [problem for part in work if (problem := _damage(part, plan.cameras))]:
        raise DataError("\n".join(damaged))
    splits: dict[str, Split] = dict(base.splits) if base else {}
    checksums: dict[str, str] = dict(base.checksums) if base else {}
    prefixes = dict(base.prefixes) if base else {}
    for split in dict.fromkeys(part.split for part in work):
        parts = [part for part in work if part.split == split]
        before = splits.get(split, Split(episodes=0, frames=0))
        start = before.frames
        old = (whole / split / EPISODES).read_text().split("\n")[: before.episodes] if start else []
        lines = []
        for episode in (e for part in parts for e in reports[part]["episodes"]):
            lines.append(Episode(**{**episode, "start": start}).model_dump_json())
            start += episode["length"]
        if not lines:
            continue
        for camera in plan.cameras:
            sums = _merge_camera([part.folder / camera for part in parts], whole / split / camera, before.frames)
            checksums |= {f"{split}/{camera}/{shard}": value for shard, value in sums.items()}
        _replace(whole / split / EPISODES, "".join(f"{line}\n" for line in [*old, *lines]))
        for name in describing(split, plan.cameras):
            prefixes[name] = prefix_of((whole / name).read_bytes(), name)
        splits[split] = Split(episodes=len(old) + len(lines), frames=start)
    if not splits:
        raise DataError("\n".join(["no episode could be read:", *some(skipped)]))
    manifest = plan.model_copy(
        update={"splits": splits, "checksums": checksums, "prefixes": prefixes, "skipped": skipped}
    )
    if base is not None and splits == base.splits:
        manifest = manifest.model_copy(update={"before": base.before, "stats": base.stats})
    elif base is not None:
        size = Size(splits=base.splits, stats=base.stats, digest=base.digest, prefixes=base.prefixes)
        sizes = [*base.before, size]
        manifest = manifest.model_copy(update={"before": sizes})
    _replace(whole / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def put_in_place(whole: Path, out: Path) -> None:
    """Rename `whole` to OUT, setting an older OUT aside first."""
    if out.exists() and any(out.iterdir()):
        old = whole.parent / "replaced"
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    os.replace(whole, out)


def some(reasons: Sequence[str], shown: int = 20) -> list[str]:
    """The first reasons as list lines, and the number of further ones."""
    rest = len(reasons) - shown
    return [f"  - {r}" for r in reasons[:shown]] + ([f"  … and {rest} more"] if rest > 0 else [])


def _index(folder: Path) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((folder / "index.json").read_text())["shards"]
    check_index(shards, str(folder / "index.json"))
    return shards


def _damage(part: Slice, cameras: Sequence[str]) -> str:
    """What is wrong with the sizes of a slice's files; a damaged slice is removed, so that it is converted again."""
    for camera in cameras:
        for shard in _index(part.folder / camera):
            path = part.folder / camera / shard["raw_data"]["basename"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["raw_data"]["bytes"]:
                shutil.rmtree(part.folder)
                return f"{path}: {size} bytes, {shard['raw_data']['bytes']} were written; run again to convert it again"
    return ""


def _merge_camera(parts: Sequence[Path], target: Path, frames: int) -> dict[str, str]:
    """Join slices' MDS folders into one, after its first `frames`; returns new shard file → sha256."""
    target.mkdir(parents=True, exist_ok=True)
    shards = first_entries(_index(target), frames) if frames else []
    checksums: dict[str, str] = {}
    for part in parts:
        for shard in _index(part):
            raw = shard["raw_data"]
            name = f"shard.{len(shards):05}.mds"
            _link(part / raw["basename"], target / name)
            raw["basename"] = name
            checksums[name] = raw["hashes"]["sha256"]
            shards.append(shard)
    _replace(target / "index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    return checksums


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # left by an addition that was killed: no index or manifest lists it
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
