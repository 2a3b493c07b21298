"""What a conversion is going to make: the episodes of each split, their slices, and the manifest so far."""

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
from data_tools.convert.slices import Job, Slice
from data_tools.convert.timing import check_rate
from data_tools.formats.registry import open_reader
from data_tools.formats.source import EpisodeRef, Scan
from data_tools.images import FITS
from stamo_dist.data.schema import Manifest
from stamo_dist.errors import DataError

TRAIN, VAL = "train", "val"
#: What datasets call the episodes they hold out.
HELD_OUT = ("val", "valid", "validation", "test")
SPLITS_BY = ("hash", "source")


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
        val_fraction: Share of the episodes held out as split "val", chosen by a hash of `seed` and the episode's id.
        split_by: "hash", or "source": the dataset's own split.
        seed: Of the split.
        max_episodes: Take only the first ones.
        max_bad: Give up when more episodes than this cannot be used; they are skipped and listed in the manifest.
        overwrite: Replace an OUT that was converted with other options or from other files.
        processes: One per usable core when omitted.
        num_slices: Number of runs that share the work.
        slice: Which of them this is, from 0.
        work: Where to convert before uploading to a URL; a folder of the user's cache when omitted.
        shard_bytes: Size at which a shard is closed; an episode longer than that gets a shard of its own.
        slice_frames: Frames that are converted as one resumable unit.
        quiet: No progress bar.
        instructions: CSV file with the columns episode and instruction, which wins over the dataset's own.
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
class Plan:
    """A conversion before its first frame."""

    job: Job
    manifest: Manifest  # without what only the shards can tell
    splits: dict[str, list[EpisodeRef]]
    bad: list[str]  # "EPISODE: reason"
    slice_frames: int

    def slices(self, folder: Path) -> list[Slice]:
        """The resumable units, each to be written to a folder of its own in `folder`."""
        return [
            Slice(split, number, tuple(episodes), folder / f"{split}-{number:05d}")
            for split, chosen in self.splits.items()
            for number, episodes in enumerate(_cut(chosen, self.slice_frames))
        ]


def make_plan(format: str, src: Path, name: str, settings: Settings) -> Plan:
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
        raise DataError("converting actions needs the package scipy; pip install 'stamo-dist[convert]'")
    episodes, notes = scan.episodes, scan.notes
    if settings.instructions is not None:
        episodes, given = give(episodes, settings.instructions)
        notes = [*(note for note in notes if FLAG not in note), *given]
    if not any(FLAG in note for note in notes):
        notes = [*notes, *silent(episodes)]
    manifest = _manifest(format, src, name, settings, replace(scan, notes=notes))
    job = Job(reader, manifest, scan.action, settings.processing, settings.shard_bytes)
    episodes = episodes[: settings.max_episodes]
    return Plan(job, manifest, split_episodes(episodes, settings), list(scan.bad), settings.slice_frames)


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
            **{f"set.{key}": value for key, value in scan.options.items()},
            **({"instructions": _digest(settings.instructions)} if settings.instructions else {}),
        },
        frame_size=scan.frame_size,
        source_fingerprint=fingerprint(src, scan.files),
        notes=scan.notes,
        tool_version=_version(),
    )


def _digest(table: Path) -> str:
    return f"{table.name}, sha256 {hashlib.sha256(table.read_bytes()).hexdigest()[:16]}"


def fingerprint(src: Path, files: Sequence[Path]) -> str:
    """sha256 over every file's name below `src`, size, first and last MiB: cheap on terabytes, blind to the middle."""
    digest = hashlib.sha256()
    root = src if src.is_dir() else src.parent
    for path in sorted(files):
        size = path.stat().st_size
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def split_episodes(episodes: Sequence[EpisodeRef], settings: Settings) -> dict[str, list[EpisodeRef]]:
    """Episodes of "train" and "val" in stored order.

    By hash, the `val_fraction` of episodes with the smallest hash are held out (at least one of two).

    Raises:
        DataError: The dataset has no split of its own, and it was asked for.
    """
    if settings.split_by == "source":
        if not any(e.split for e in episodes):
            raise DataError("split_by: this dataset has no split of its own; give --split-by hash")
        held = {e.id for e in episodes if e.split.lower() in HELD_OUT}
    else:
        count = round(len(episodes) * settings.val_fraction)
        if settings.val_fraction > 0 and len(episodes) > 1:
            count = min(max(count, 1), len(episodes) - 1)
        elif len(episodes) == 1:
            count = 0
        ranked = sorted(episodes, key=lambda e: hashlib.sha256(f"{settings.seed}/{e.id}".encode()).digest())
        held = {e.id for e in ranked[:count]}
    chosen = {TRAIN: [e for e in episodes if e.id not in held], VAL: [e for e in episodes if e.id in held]}
    return {split: members for split, members in chosen.items() if members}


def check_bad(bad: Sequence[str], max_bad: int) -> None:
    """Raises:
    DataError: More episodes than `max_bad` cannot be used.
    """
    if len(bad) > max_bad:
        head = f"{len(bad)} episodes cannot be used (max_bad is {max_bad}; raise it with --max-bad to skip them):"
        raise DataError("\n".join([head, *some(bad)]))


def check_stated(settings: Settings, scan: Scan) -> None:
    """Raises:
    DataError: Frames are dropped, and nobody said whether the actions are deltas, which would have to be added up.
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
