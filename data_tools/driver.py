"""From any dataset to shards: the part all formats share.

A format is a Reader: it scans a source for its episodes, cheaply and with every problem at once, and reads one episode
at a time. The driver splits the episodes, cuts each split into slices of whole episodes, converts the slices (in
processes of their own when there are several) and puts them together as stamo_dist/data/schema.py describes.

The result depends on the source and the options alone. Everything is written under `.NAME.partial` beside OUT; a slice
counts once its folder has its final name, and OUT appears whole by one rename. A killed conversion continues after its
last whole slice and gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools import slices
from data_tools.source import EpisodeRef, Reader
from stamo_dist.data.schema import EPISODES, MANIFEST, Episode, Manifest, Split, read_manifest
from stamo_dist.errors import DataError

TRAIN, VAL = "train", "val"
#: Most problems or skipped episodes that one error prints.
SHOWN = 20


def open_reader(format: str, src: Path, options: Mapping[str, Any]) -> Reader:
    """The Reader of a source format; `options` are the format's own.

    Raises:
        DataError: Unknown format.
    """
    if format == "libero":
        from data_tools.libero import LiberoReader

        return LiberoReader(src, **options)
    raise DataError(f"unknown format {format!r}; there is: libero")


def convert(
    format: str,
    src: Path,
    out: Path,
    *,
    name: str | None = None,
    size: int = 256,
    val_fraction: float = 0.05,
    quality: int = 95,
    seed: int = 0,
    max_bad: int = 10,
    overwrite: bool = False,
    processes: int | None = None,
    shard_bytes: int = 1 << 26,
    slice_frames: int = 8192,
    quiet: bool = False,
    options: Mapping[str, Any] | None = None,
) -> tuple[Manifest, bool]:
    """Convert SRC into shards in OUT, as stamo_dist/data/schema.py describes.

    Args:
        format: "libero".
        src: File or folder of the source dataset.
        out: Folder to create.
        name: Name of the source in the shards; OUT's folder name when omitted.
        size: Side of the square frames in pixels; other shapes are cropped to their middle first.
        val_fraction: Share of the episodes held out as split "val", chosen by a hash of `seed` and the episode's id.
        quality: JPEG quality.
        seed: Of the split.
        max_bad: Give up when more episodes than this cannot be read; they are skipped and listed in the manifest.
        overwrite: Replace an OUT that was converted with other options or from other files.
        processes: One per usable core when omitted.
        shard_bytes: Size at which a shard is closed; an episode longer than that gets a shard of its own.
        slice_frames: Frames that are converted as one resumable unit.
        quiet: No progress bar.
        options: The format's own options; see its Reader.

    Returns:
        The manifest, and whether anything was done (False: OUT was whole already).

    Raises:
        DataError: Options, source or output that cannot be used, all problems at once.
    """
    src, out = Path(src), Path(out)
    _check_options(
        size=size,
        val_fraction=val_fraction,
        quality=quality,
        max_bad=max_bad,
        shard_bytes=shard_bytes,
        slice_frames=slice_frames,
    )
    reader = open_reader(format, src, options or {})
    scan = reader.scan()
    _check_bad(scan.bad, max_bad)
    if not scan.episodes:
        raise DataError("\n".join([f"{src}: no usable episode", *_some(scan.bad)]))
    plan = Manifest(
        name=name or out.resolve().name,
        source_format=format,
        image_size=size,
        cameras=scan.cameras,
        splits={},
        rate_hz=scan.rate_hz,
        action_dim=scan.action_dim,
        proprio_dim=scan.proprio_dim,
        convention=scan.convention,
        options={
            "val_fraction": val_fraction,
            "quality": quality,
            "seed": seed,
            "shard_bytes": shard_bytes,
            "slice_frames": slice_frames,
            **scan.options,
        },
        source_fingerprint=fingerprint(src, scan.files),
        tool_version=_version(),
    )
    if (existing := _existing(out, plan, overwrite)) is not None:
        return existing, False

    partial = out.parent / f".{out.name}.partial"
    _prepare(partial, out, plan)
    work = [
        slices.Slice(split, number, tuple(episodes), partial / f"{split}-{number:05d}")
        for split, chosen in split_episodes(scan.episodes, val_fraction, seed).items()
        for number, episodes in enumerate(_cut(chosen, slice_frames))
    ]
    job = slices.Job(reader, plan, quality, shard_bytes)
    bad = list(scan.bad)
    for reasons in slices.run(job, work, processes, quiet):
        bad += reasons
        _check_bad(bad, max_bad)
    manifest = _put_together(partial / "whole", plan, work, sorted(bad))
    _put_in_place(partial / "whole", out)
    shutil.rmtree(partial, ignore_errors=True)
    return manifest, True


def fingerprint(src: Path, files: Sequence[Path]) -> str:
    """sha256 over every file's relative path, size, first and last MiB: cheap on terabytes, blind to the middle."""
    digest = hashlib.sha256()
    root = src if src.is_dir() else src.parent
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def split_episodes(episodes: Sequence[EpisodeRef], val_fraction: float, seed: int) -> dict[str, list[EpisodeRef]]:
    """Hold out the `val_fraction` of episodes with the smallest hash (at least one of two), in stored order."""
    count = round(len(episodes) * val_fraction)
    if val_fraction > 0 and len(episodes) > 1:
        count = min(max(count, 1), len(episodes) - 1)
    elif len(episodes) == 1:
        count = 0
    ranked = sorted(episodes, key=lambda e: hashlib.sha256(f"{seed}/{e.id}".encode()).digest())
    held = {e.id for e in ranked[:count]}
    chosen = {TRAIN: [e for e in episodes if e.id not in held], VAL: [e for e in episodes if e.id in held]}
    return {split: members for split, members in chosen.items() if members}


def _cut(episodes: Sequence[EpisodeRef], slice_frames: int) -> list[list[EpisodeRef]]:
    cut: list[list[EpisodeRef]] = [[]]
    frames = 0
    for episode in episodes:
        if cut[-1] and frames + episode.length > slice_frames:
            cut.append([])
            frames = 0
        cut[-1].append(episode)
        frames += episode.length
    return cut


def _check_options(
    *, size: int, val_fraction: float, quality: int, max_bad: int, shard_bytes: int, slice_frames: int
) -> None:
    rules = (
        (8 <= size <= 4096, f"size: {size} must be between 8 and 4096 pixels"),
        (0 <= val_fraction < 1, f"val_fraction: {val_fraction} must be at least 0 and below 1"),
        (1 <= quality <= 100, f"quality: {quality} must be between 1 and 100"),
        (max_bad >= 0, f"max_bad: {max_bad} must not be negative"),
        (1 <= shard_bytes < 2**31, f"shard_bytes: {shard_bytes} must be positive and below 2 GiB"),
        (slice_frames >= 1, f"slice_frames: {slice_frames} must be positive"),
    )
    if problems := [problem for fine, problem in rules if not fine]:
        raise DataError("\n".join(problems))


def _some(reasons: Sequence[str]) -> list[str]:
    rest = len(reasons) - SHOWN
    return [f"  - {r}" for r in reasons[:SHOWN]] + ([f"  … and {rest} more"] if rest > 0 else [])


def _check_bad(bad: Sequence[str], max_bad: int) -> None:
    if len(bad) > max_bad:
        head = f"{len(bad)} episodes cannot be used (max_bad is {max_bad}; raise it with --max-bad to skip them):"
        raise DataError("\n".join([head, *_some(bad)]))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("stamo-dist")
    except PackageNotFoundError:
        return ""


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


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What must be equal for two conversions to give the same shards."""
    dumped = manifest.model_dump(mode="json")
    return {key: dumped[key] for key in _IDENTITY}


def _existing(out: Path, plan: Manifest, overwrite: bool) -> Manifest | None:
    """The manifest in OUT if it is what the plan would give; None if OUT is free or may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out}: exists and was not written by `stamo data convert`; choose another OUT")
    found = read_manifest(out)
    if _identity(found) == _identity(plan):
        return found
    if overwrite:
        return None
    old, new = _identity(found), _identity(plan)
    lines = [f"{out}: already converted, but with another"]
    for key in _IDENTITY:
        if key == "options":
            changed = sorted(k for k in {**old[key], **new[key]} if old[key].get(k) != new[key].get(k))
            lines += [f"  - {k}: {old[key].get(k)} (asked: {new[key].get(k)})" for k in changed]
        elif old[key] != new[key]:
            lines.append(f"  - {key}: {old[key]} (asked: {new[key]})")
    raise DataError("\n".join([*lines, "choose another OUT, or replace it with --overwrite"]))


def _prepare(partial: Path, out: Path, plan: Manifest) -> None:
    """Make the folder of slices; keep what an interrupted conversion of the same plan left, drop anything else."""
    identity = json.dumps(_identity(plan), sort_keys=True)
    stamp = partial / "plan.json"
    try:
        if partial.exists() and (not stamp.is_file() or stamp.read_text() != identity):
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        stamp.write_text(identity)
        shutil.rmtree(partial / "whole", ignore_errors=True)
    except OSError as e:
        raise DataError(f"{out}: cannot be written: {e.strerror or e}") from e


def _put_together(whole: Path, plan: Manifest, work: Sequence[slices.Slice], skipped: list[str]) -> Manifest:
    """Lay the slices out as one source under `whole`; the manifest comes last."""
    splits: dict[str, Split] = {}
    checksums: dict[str, str] = {}
    for split in dict.fromkeys(s.split for s in work):
        parts = [s for s in work if s.split == split]
        start = 0
        lines = []
        for episode in (e for s in parts for e in s.converted()):
            lines.append(Episode(**{**episode, "start": start}).model_dump_json())
            start += episode["length"]
        if not lines:
            continue
        (whole / split).mkdir(parents=True)
        for camera in plan.cameras:
            sums = slices.merge_camera([s.folder / camera for s in parts], whole / split / camera)
            checksums |= {f"{split}/{camera}/{shard}": value for shard, value in sums.items()}
        (whole / split / EPISODES).write_text("".join(f"{line}\n" for line in lines))
        splits[split] = Split(episodes=len(lines), frames=start)
    if not splits:
        raise DataError("\n".join(["no episode could be read:", *_some(skipped)]))
    manifest = plan.model_copy(update={"splits": splits, "checksums": checksums, "skipped": skipped})
    (whole / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _put_in_place(whole: Path, out: Path) -> None:
    """Rename `whole` to OUT, setting an older OUT aside first."""
    try:
        if out.exists() and any(out.iterdir()):
            old = whole.parent / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
        os.replace(whole, out)
    except OSError as e:
        raise DataError(f"{out}: cannot be written: {e.strerror or e}") from e
