"""The plan of a conversion: the episodes of each split, their slices, and the manifest so far."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_tools.convert.actions import KINDS, convention
from data_tools.convert.episode import Processing
from data_tools.convert.guard import scanned
from data_tools.convert.instructions import FLAG, give, silent
from data_tools.convert.merge import some
from data_tools.convert.slices import ConversionJob, Slice
from data_tools.convert.timing import check_rate
from data_tools.formats.registry import as_record, open_reader
from data_tools.formats.source import EpisodeRef, Scan
from data_tools.images import FITS
from stamo_dist.data.schema import Manifest
from stamo_dist.errors import DataError
from stamo_dist.extras import how_to_install

TRAIN, VAL = "train", "val"
#: Names that datasets use for held-out splits.
HELD_OUT = ("val", "valid", "validation", "test")
SPLITS_BY = ("hash", "source")
#: For the fingerprint: bytes read at a file's beginning and end, at most in all files, and per read.
_ENDS, _CHEAP, _BLOCK = 1 << 20, 32 << 20, 1 << 24


@dataclass(frozen=True)
class Settings:
    """How to convert; each with its default.

    Attributes:
        name: Name of the source in the shards; OUT's last part when omitted.
        size: Side of the square frames in pixels.
        fit: How other shapes become square: "crop" to the middle, "letterbox" with black bars, "stretch".
        quality: Of the JPEGs; frames that are JPEGs of this size already are kept as they are.
        rate_hz: Frames per second to keep, by their times; all of them when omitted.
        action: "delta", "absolute" or "original"; see data_tools/convert/actions.py.
        drop_noops: Leave out steps without motion and without a new gripper command.
        val_fraction: Share of the episodes held out as split "val": those whose hash (of `seed` and id) is below it.
        split_by: "hash", or "source": the dataset's own split.
        seed: Of the split.
        max_episodes: Take only the first ones.
        episodes: Take only those from the first number up to the second, from 0, in stored order.
        max_bad: Give up when more episodes than this cannot be used; they are skipped and listed in the manifest.
        hash_files: Tell whether the dataset changed by its files' content, not by their sizes and times.
        overwrite: Replace an OUT that was converted with other options or from other files.
        processes: One per usable core when omitted.
        num_slices: Number of runs that share the work.
        slice: Which of them this is, from 0.
        work: Where to convert before uploading to a URL; a folder of the user's cache when omitted.
        shard_bytes: Size at which a shard is closed; an episode longer than that gets a shard of its own.
        slice_frames: Frames that are converted as one resumable unit.
        quiet: No progress bar.
        instructions: CSV file with the columns episode and instruction, which overrides the dataset's own.
        options: The format's own options, and `cameras`.
    """

    name: str | None = None
    size: int = 256
    fit: str = "crop"
    quality: int = 95
    rate_hz: float | None = None
    action: str = "delta"
    drop_noops: bool = False
    val_fraction: float = 0.05
    split_by: str = "hash"
    seed: int = 0
    max_episodes: int | None = None
    episodes: tuple[int, int | None] | None = None
    hash_files: bool = False
    max_bad: int = 10
    overwrite: bool = False
    processes: int | None = None
    num_slices: int = 1
    slice: int = 0
    work: Path | None = None
    shard_bytes: int = 1 << 26
    slice_frames: int = 8192
    quiet: bool = False
    instructions: Path | None = None
    options: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raises:
        DataError: Values out of range, all at once.
        """
        rules = (
            (8 <= self.size <= 4096, f"size: {self.size} must be between 8 and 4096 pixels"),
            (self.fit in FITS, f"fit: {self.fit!r} must be one of {', '.join(FITS)}"),
            (0 <= self.val_fraction < 1, f"val_fraction: {self.val_fraction} must be at least 0 and below 1"),
            (self.split_by in SPLITS_BY, f"split_by: {self.split_by!r} must be one of {', '.join(SPLITS_BY)}"),
            (self.action in KINDS, f"action: {self.action!r} must be one of {', '.join(KINDS)}"),
            (1 <= self.quality <= 100, f"quality: {self.quality} must be between 1 and 100"),
            (self.max_episodes is None or self.max_episodes > 0, f"max_episodes: {self.max_episodes} must be positive"),
            (
                self.episodes is None or 0 <= self.episodes[0] < (self.episodes[1] or self.episodes[0] + 1),
                f"episodes: {self.episodes} must be a first number and a greater last, e.g. 0:100",
            ),
            (self.max_bad >= 0, f"max_bad: {self.max_bad} must not be negative"),
            (1 <= self.shard_bytes < 2**31, f"shard_bytes: {self.shard_bytes} must be positive and below 2 GiB"),
            (self.slice_frames >= 1, f"slice_frames: {self.slice_frames} must be positive"),
            (
                0 <= self.slice < self.num_slices,
                f"slice: {self.slice} must be between 0 and num_slices - 1 ({self.num_slices - 1})",
            ),
        )
        if problems := [problem for fine, problem in rules if not fine]:
            raise DataError("\n".join(problems))

    @property
    def processing(self) -> Processing:
        return Processing(self.size, self.fit, self.quality, self.rate_hz, self.action, self.drop_noops)


#: Settings that decide what the shards hold, besides the fields of the manifest.
RECORDED = (
    "fit",
    "quality",
    "rate_hz",
    "action",
    "drop_noops",
    "val_fraction",
    "split_by",
    "seed",
    "max_episodes",
    "shard_bytes",
    "slice_frames",
)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that is decided before the first frame is converted."""

    job: ConversionJob
    manifest: Manifest  # without the fields that are known only from the shards
    splits: dict[str, list[EpisodeRef]]
    bad: list[str]  # "EPISODE: reason"
    slice_frames: int

    base: Manifest | None = None  # what it adds to

    @property
    def episodes(self) -> list[EpisodeRef]:
        return [e for members in self.splits.values() for e in members]

    def slices(self, folder: Path, prefix: str = "") -> list[Slice]:
        """The resumable units, each written to its own folder in `folder`."""
        return [
            Slice(split, number, tuple(episodes), folder / f"{prefix}{split}-{number:05d}")
            for split, chosen in self.splits.items()
            for number, episodes in enumerate(_cut(chosen, self.slice_frames))
        ]


def make_plan(format: str, src: Path, name: str, settings: Settings) -> ConversionPlan:
    """Scan the source.

    Raises:
        DataError: Settings or source that cannot be used, all problems at once.
    """
    settings.check()
    reader = open_reader(format, src, settings.options or {})
    scan = scanned(format, src, reader)
    check_bad(scan.bad, settings.max_bad)
    if not scan.episodes:
        raise DataError("\n".join([f"{src}: no usable episode", *some(scan.bad)]))
    if doubles := [
        f"{id}: {n} episodes have this id" for id, n in Counter(e.id for e in scan.episodes).items() if n > 1
    ]:
        raise DataError("\n".join([f"{src}: episodes that cannot be told apart", *some(doubles)]))
    check_rate(settings.rate_hz, scan.rate_hz)
    check_stated(settings, scan)
    if scan.action and scan.action.mode != "other" and find_spec("scipy") is None:
        raise DataError(f"converting actions needs the package scipy; {how_to_install('convert')}")
    episodes, notes = scan.episodes, scan.notes
    if settings.instructions is not None:
        episodes, given = give(episodes, settings.instructions)
        notes = [*(note for note in notes if FLAG not in note), *given]
    if not any(FLAG in note for note in notes):
        notes = [*notes, *silent(episodes)]
    notes = [*notes, *_enlarged(scan.frame_size, settings)]
    episodes = episodes[slice(*(settings.episodes or (None,)))][: settings.max_episodes]
    if not episodes:
        raise DataError(f"episodes: {src} has {len(scan.episodes)}; none is left of what was asked for")
    splits, chosen = split_episodes(episodes, settings)
    manifest = _manifest(format, src, name, settings, replace(scan, notes=[*notes, *chosen]))
    job = ConversionJob(reader, manifest, scan.action, settings.processing, settings.shard_bytes)
    return ConversionPlan(job, manifest, splits, list(scan.bad), settings.slice_frames)


def _manifest(format: str, src: Path, name: str, settings: Settings, scan: Scan) -> Manifest:
    actions = convention(scan.action, settings.action)
    return Manifest(
        name=name,
        source_format=format,
        image_size=settings.size,
        cameras=scan.cameras,
        splits={},
        rate_hz=settings.rate_hz or scan.rate_hz,
        action_dim=actions.dim,
        proprio_dim=scan.proprio_dim,
        convention=actions.text,
        original_action_dim=scan.action.dim if scan.action else 0,
        original_convention=scan.action.text if scan.action else "",
        gripper=actions.gripper,
        options={
            **{key: value for key, value in asdict(settings).items() if key in RECORDED},
            **({"episodes": list(settings.episodes)} if settings.episodes else {}),
            **{f"set.{key}": value for key, value in scan.options.items()},
            **({"instructions": _digest(settings.instructions)} if settings.instructions else {}),
        },
        given=as_record(settings.options or {}),
        frame_size=scan.frame_size,
        source_fingerprint=fingerprint(src, scan.files, whole=settings.hash_files),
        notes=scan.notes,
        tool_version=_version(),
    )


def _enlarged(frame_size: tuple[int, int] | None, settings: Settings) -> list[str]:
    """A note if the frames (H, W) become larger than they are."""
    if frame_size is None or (side := (max if settings.fit == "letterbox" else min)(frame_size)) >= settings.size:
        return []
    now, then = (f"{height} × {width}" for height, width in (frame_size, (settings.size, settings.size)))
    return [f"frames: {now} pixels, enlarged to {then}, which adds no detail; --size {side} does not enlarge them"]


def _digest(table: Path) -> str:
    return f"{table.name}, sha256 {hashlib.sha256(table.read_bytes()).hexdigest()[:16]}"


def fingerprint(src: Path, files: Sequence[Path], *, whole: bool = False) -> str:
    """sha256 over the name, size and modification time of every file below `src`; for small sets content replaces time.

    `whole`: Hash the full content of all files.
    """
    digest = hashlib.sha256()
    root = src if src.is_dir() else src.parent
    stats = {path: path.stat() for path in sorted(files)}
    timed = not whole and sum(min(stat.st_size, 2 * _ENDS) for stat in stats.values()) > _CHEAP
    for path, stat in stats.items():
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        digest.update(f"{name}\0{stat.st_size}\0".encode())
        if timed:
            digest.update(f"{stat.st_mtime_ns}\0".encode())
            continue
        with path.open("rb") as file:
            if whole:
                while block := file.read(_BLOCK):
                    digest.update(block)
            else:
                digest.update(file.read(_ENDS))
                file.seek(max(0, stat.st_size - _ENDS))
                digest.update(file.read(_ENDS))
    return ("whole " if whole else "times " if timed else "") + digest.hexdigest()


def split_episodes(
    episodes: Sequence[EpisodeRef], settings: Settings, *, fill: bool = True
) -> tuple[dict[str, list[EpisodeRef]], list[str]]:
    """Episodes of "train" and "val" in stored order, and a note on what was done so that neither is empty.

    By hash, whether an episode is held out does not depend on the other episodes, so a growing set keeps its split.
    With `fill`, two or more episodes give at least one held-out and one training episode.

    Raises:
        DataError: `split_by` is "source" and the dataset has no split of its own.
    """
    notes = []
    if settings.split_by == "source":
        if not any(e.split for e in episodes):
            raise DataError("split_by: this dataset has no split of its own; give --split-by hash")
        held = {e.id for e in episodes if e.split.lower() in HELD_OUT}
    else:
        shares = {e.id: _share(settings.seed, e.id) for e in episodes}
        held = {id for id, share in shares.items() if share < settings.val_fraction}
        if fill and settings.val_fraction and len(shares) == 1:
            notes, held = [f"{episodes[0].id}: not held out, as it is the only one"], set()
        elif fill and settings.val_fraction and len(held) in (0, len(shares)):
            odd = max(shares, key=shares.__getitem__) if held else min(shares, key=shares.__getitem__)
            side = "not held out" if held else "held out"
            notes = [f"{odd}: {side}, as its hash ({shares[odd]:.3f}) comes nearest to {settings.val_fraction:g}"]
            held ^= {odd}
    chosen = {TRAIN: [e for e in episodes if e.id not in held], VAL: [e for e in episodes if e.id in held]}
    return {split: members for split, members in chosen.items() if members}, notes


def _share(seed: int, id: str) -> float:
    """Uniform in [0, 1)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}".encode()).digest()[:8], "big") / 2**64


def check_bad(bad: Sequence[str], max_bad: int) -> None:
    """Raises:
    DataError: More episodes than `max_bad` cannot be used.
    """
    if len(bad) > max_bad:
        head = f"{len(bad)} episodes cannot be used (max_bad is {max_bad}; raise it with --max-bad to skip them):"
        raise DataError("\n".join([head, *some(bad)]))


def check_stated(settings: Settings, scan: Scan) -> None:
    """Raises:
    DataError: Frames are dropped and it is unknown whether actions are deltas, which would have to be summed.
    """
    dropped = (settings.rate_hz or scan.rate_hz) < scan.rate_hz
    if scan.action and scan.action.unstated and dropped and settings.action != "original":
        raise DataError(
            f"rate: {settings.rate_hz:g} Hz leaves out frames of {scan.rate_hz:g} Hz, but what the actions "
            f"({scan.action.text}) mean is not said: deltas would have to be added up; give {scan.action.unstated}, or "
            "--action original"
        )


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


def _version() -> str:
    try:
        return version("stamo-dist")
    except PackageNotFoundError:
        return ""
