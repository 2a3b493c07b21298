"""`stamo data check --against SRC`: whether the shards match the dataset they were converted from.

Numbers and texts are read from SRC again and compared in full. A few images per episode are read by another method
than conversion's sequential decoding: in videos by seeking to the frame's time, elsewhere one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_tools.convert.episode import DAMAGE, KeptTimesteps, Processing, read_moments
from data_tools.convert.plan import fingerprint
from data_tools.formats.declared import TURN
from data_tools.formats.registry import from_record, open_reader, parse_options
from data_tools.formats.source import EpisodeRef, Scan, SourceReader
from data_tools.images import decode, encode_frames
from data_tools.look.check_report import ERROR, WARNING, CheckFinding
from data_tools.look.columns import ColumnShard, IndexedShard
from data_tools.look.each_shard import store_at
from data_tools.look.seek import picture_at
from data_tools.stores.store import at_hand
from stamo_dist.data.schema import MANIFEST, Episode, Manifest
from stamo_dist.errors import DataError

CHECK = "source"
#: Images compared per episode and camera, including the first and last; the second number with --fast.
PICTURES, PICTURES_FAST = 5, 3
#: Accepted mean difference (of 255) from the source's image after equal encoding: rounding of another decoder.
TOLERANCE = 2.0
#: If an image differs from a neighbouring frame this many times less than from its own, it is off by one.
NEARER = 4.0
#: Tolerances: relative for vectors, stored as float32; for times in s.
RELATIVE, ABSOLUTE, SECONDS = 1e-4, 1e-5, 1e-3


@dataclass(frozen=True)
class Original:
    """The dataset a source was converted from, opened with the options of the conversion."""

    reader: SourceReader
    scan: Scan
    processing: Processing
    where: str
    told: bool  # instructions came from a table, which is not available here

    @property
    def episodes(self) -> dict[str, EpisodeRef]:
        return {episode.id: episode for episode in self.scan.episodes}


@dataclass(frozen=True)
class SourceTask:
    """One shard, and the dataset episodes that it should contain."""

    source: str
    split: str
    camera: str
    shard: IndexedShard
    begin: int  # its first sample in the split
    rows: Sequence[Episode]  # its lines of episodes.jsonl
    refs: Mapping[str, EpisodeRef]
    original: Original  # without the episodes
    proprio_dim: int
    pictures: int  # of each episode
    vectors: bool  # also compare the columns that are equal in all cameras


@dataclass
class Compared:
    """The result of comparing a shard."""

    findings: list[CheckFinding] = field(default_factory=list)
    pictures: int = 0


def open_original(manifest: Manifest, src: Path, set: Sequence[str]) -> tuple[Original, list[CheckFinding]]:
    """Scan SRC with the options of its conversion, updated by `set` (KEY=VALUE); also returns the scan's findings.

    Raises:
        DataError: SRC cannot be read with these options, or lacks a camera.
    """
    given = {"cameras": manifest.cameras, **from_record(manifest.source_format, manifest.given)}
    given |= parse_options(manifest.source_format, set)
    reader = open_reader(manifest.source_format, src, given)
    scan = reader.scan()
    if missing := [camera for camera in manifest.cameras if camera not in scan.cameras]:
        raise DataError(f"{src}: no camera {', '.join(missing)}; it has {', '.join(scan.cameras)}")
    made = manifest.options
    processing = Processing(
        size=manifest.image_size,
        fit=made.get("fit", "crop"),
        quality=made.get("quality", 95),
        rate_hz=made.get("rate_hz"),
        action=made.get("action", "delta"),
        drop_noops=made.get("drop_noops", False),
    )
    findings = []
    if manifest.source_fingerprint and fingerprint(src, scan.files) != manifest.source_fingerprint:
        text = f"{src}: its files are not those that were converted (other names, sizes or contents)"
        findings.append(CheckFinding(CHECK, WARNING, text, shard=MANIFEST))
    return Original(reader, scan, processing, str(src), "instructions" in made), findings


def left_out(original: Original, manifest: Manifest, tables: Mapping[str, Sequence[Episode]]) -> Iterator[CheckFinding]:
    """Episodes of the dataset that are in no split and were not skipped; all splits are needed to tell."""
    if manifest.options.get("max_episodes") is not None or tables.keys() != manifest.splits.keys():
        return
    there = {row.id for rows in tables.values() for row in rows}
    skipped = tuple(manifest.skipped)
    lost = [id for id in original.episodes if id not in there and not any(s.startswith(f"{id}: ") for s in skipped)]
    if lost:
        text = f"{len(lost)} episodes of {original.where} are in no split, the first is {lost[0]}"
        yield CheckFinding(CHECK, WARNING, text, shard=MANIFEST, count=len(lost))


def compare(task: SourceTask) -> Compared:
    """Compare one shard with the dataset; damage is returned as findings."""
    compared = Compared()
    try:
        with at_hand(store_at(task.source), f"{task.split}/{task.camera}/{task.shard.name}") as path:
            shard = ColumnShard(task.shard.spec(path))
            for row in task.rows:
                found = _episode(task, shard, row, compared)
                compared.findings += [replace(f, episode=row.id) for f in found]
    except DataError as e:
        compared.findings.append(CheckFinding(CHECK, ERROR, f"cannot be compared: {e}"))
    compared.findings = [f.at(task.split, task.camera, task.shard.name) for f in compared.findings]
    return compared


def _episode(task: SourceTask, shard: ColumnShard, row: Episode, compared: Compared) -> Iterator[CheckFinding]:
    original, ref = task.original, task.refs.get(row.id)
    if ref is None:
        yield CheckFinding(CHECK, ERROR, f"is not an episode of {original.where}")
        return
    try:
        moments = read_moments(
            original.reader,
            ref,
            original.processing,
            cameras=[task.camera],
            spec=original.scan.action,
            proprio_dim=task.proprio_dim,
        )
    except DataError as e:
        yield CheckFinding(CHECK, ERROR, f"cannot be read from {original.where}: {e}")
        return
    first = row.start - task.begin
    if first < 0 or first + row.length > len(shard):
        return  # an episode split over shards is reported separately
    if len(moments.kept) != row.length:
        yield CheckFinding(CHECK, ERROR, f"has {row.length} frames; {original.where} gives {len(moments.kept)}")
        return
    if task.vectors:
        yield from _numbers(shard, first, moments)
        if not original.told:
            yield from _texts(shard, first, moments)
    yield from _pictures(task, shard, first, moments, compared)


def _numbers(shard: ColumnShard, first: int, moments: KeptTimesteps) -> Iterator[CheckFinding]:
    """Compare times, actions and proprioception with the dataset's."""
    there = slice(first, first + len(moments.kept))
    expected = {"time": moments.times[:, None], **moments.vectors}
    for name, values in expected.items():
        if name not in shard.spec.layout.names:
            yield CheckFinding(CHECK, ERROR, f"has no {name}, the dataset does")
            continue
        stored = np.asarray(shard.vectors(name)[there], np.float64)
        if stored.shape != values.shape:
            yield CheckFinding(
                CHECK, ERROR, f"{name} has {stored.shape[1]} numbers a frame, the dataset {values.shape[1]}"
            )
            continue
        slack = SECONDS if name == "time" else ABSOLUTE + RELATIVE * np.abs(values)
        wrong = np.flatnonzero(~(np.abs(stored - values) <= slack).all(axis=1))  # negated: NaN counts as different
        if len(wrong):
            t = int(wrong[0])
            d = int(np.argmax(np.abs(stored[t] - values[t])))
            place = "" if stored.shape[1] == 1 else f"[{d}]"
            text = f"{name}{place} is {stored[t, d]:.6g}, but {values[t, d]:.6g} in the dataset"
            yield CheckFinding(CHECK, ERROR, text, frame=t, count=len(wrong))


def _texts(shard: ColumnShard, first: int, moments: KeptTimesteps) -> Iterator[CheckFinding]:
    """Compare each frame's instruction with the dataset's."""
    stored = [bytes(shard.shard.bytes(first + t, "instruction")).decode() for t in range(len(moments.kept))]
    wrong = [t for t, (mine, theirs) in enumerate(zip(stored, moments.instructions, strict=True)) if mine != theirs]
    if wrong:
        t = wrong[0]
        text = f"instruction is {stored[t]!r}, but {moments.instructions[t]!r} in the dataset"
        yield CheckFinding(CHECK, ERROR, text, frame=t, count=len(wrong))


def _pictures(
    task: SourceTask, shard: ColumnShard, first: int, moments: KeptTimesteps, compared: Compared
) -> Iterator[CheckFinding]:
    """Compare a few images with the dataset's; one finding for all that differ."""
    picks = np.unique(np.linspace(0, len(moments.kept) - 1, task.pictures).round().astype(int)).tolist()
    found: list[CheckFinding] = []
    for p in picks:
        compared.pictures += 1
        try:
            stored = bytes(shard.shard.bytes(first + p, "image"))
            if text := _other(task, stored, moments, p):
                found.append(CheckFinding(CHECK, ERROR, text, frame=p))
        except DAMAGE as e:
            found.append(CheckFinding(CHECK, ERROR, f"cannot be compared ({type(e).__name__}: {e})", frame=p))
        except DataError as e:
            found.append(CheckFinding(CHECK, ERROR, f"cannot be compared: {e}", frame=p))
    if found:
        more = f"; so do {len(found)} of the {len(picks)} frames looked at" if len(found) > 1 else ""
        yield replace(found[0], text=found[0].text + more, count=len(found))


def _other(task: SourceTask, stored: bytes, moments: KeptTimesteps, p: int) -> str:
    """How a stored image differs from the dataset's frame `p`; "" if it does not."""
    expected = _expected(task, moments, p)
    if stored == expected:
        return ""
    mine = decode(stored).astype(np.float32)
    away = _difference(mine, expected)
    beside = {q: _difference(mine, _expected(task, moments, q)) for q in (p - 1, p + 1) if 0 <= q < len(moments.kept)}
    nearest = min(beside, key=lambda q: beside[q], default=p)
    told = f"differs by {away:.1f} grey levels of 255, in the mean, from the dataset's frame {moments.kept[p]}"
    if away > NEARER * beside.get(nearest, away):
        return f"{told}; it is the one {'after' if nearest > p else 'before'} it"
    return told if away > TOLERANCE else ""


def _difference(mine: np.ndarray, other: bytes) -> float:
    pixels = decode(other)
    return float(np.abs(mine - pixels).mean()) if pixels.shape == mine.shape else 255.0


def _expected(task: SourceTask, moments: KeptTimesteps, p: int) -> bytes:
    """The dataset's kept frame number `p`, encoded as in the conversion."""
    number, about = int(moments.kept[p]), task.original.processing
    picture: np.ndarray | bytes | None = None
    if film := moments.data.films.get(task.camera):
        picture = picture_at(film.path, float(film.seconds[number]))
        picture = None if picture is None else picture[TURN[film.orientation or "upright"]]
    if picture is None:
        (picture,) = moments.data.frames[task.camera]([number])
    return encode_frames([picture], [number], about.size, about.fit, about.quality)[0]
