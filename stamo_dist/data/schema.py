"""The one schema of every converted source.

A converted source is a folder::

    SOURCE/manifest.json                      what it is (Manifest); written last, so its presence means "complete"
    SOURCE/SPLIT/episodes.jsonl               one Episode a line, in stored order, shared by all cameras
    SOURCE/SPLIT/CAMERA/index.json, shard.*   mosaicml-streaming MDS, one sample a frame

A source may grow: shards, lines of episodes.jsonl and entries of index.json are appended, then the manifest is
replaced. A process that reads by an older manifest reads only the counts given there.

Frames of an episode are contiguous and in one shard, so frame t+k is sample i+k of the same shard. All cameras of
a split hold the same episodes in the same order, so sample i is the same timestep in each of them.
"""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stamo_dist.data.confined import check_folder_name
from stamo_dist.errors import DataError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
EPISODES = "episodes.jsonl"
#: What to do about a damaged source, in errors.
REPAIR = "`stamo data convert` with the same arguments makes it anew; what was copied, copy again"


def columns(*, action: int, original_action: int, proprio: int) -> dict[str, str]:
    """MDS columns of one frame, for sources with vectors of these dimensions; a vector of dimension 0 has no column."""
    vectors = {"action": action, "original_action": original_action, "proprio": proprio}
    return {
        "image": "bytes",  # JPEG, RGB, upright
        "episode": "str",
        "t": "int",  # frame of the episode
        "length": "int",  # frames of the episode
        "time": "float64",  # seconds since the episode began
        # action: taken at this frame, in the manifest's `convention`; original_action: as the dataset stored it.
        **{name: f"ndarray:float32:{size}" for name, size in vectors.items() if size},
        "instruction": "str",
        "source": "str",
        "camera": "str",
        "convention": "str",
    }


class Episode(BaseModel):
    """One line of episodes.jsonl."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    start: int = Field(ge=0)  # first sample of the episode within its split
    length: int = Field(gt=0)
    instruction: str = ""
    later_instructions: dict[int, str] = {}  # first frame → instruction from there on, if it changes within the episode
    task: str = ""
    meta: dict[str, Any] = {}  # further metadata of the dataset
    digest: str = ""  # hash of the dataset's rows: times, actions, proprioception, texts

    def instruction_at(self, t: int) -> str:
        """The instruction of frame `t`."""
        begun = [first for first in self.later_instructions if first <= t]
        return self.later_instructions[max(begun)] if begun else self.instruction


#: Relative precision of quantiles (`stamo data stats`): closer ones count as equal.
_SAME = 1e-3


def _same(a: float, b: float, width: float) -> bool:
    """Whether two quantiles of a dimension with range `width` are equal within precision."""
    return b - a <= _SAME * min(max(abs(a), abs(b)), width)


class Stats(BaseModel):
    """Statistics of one vector over all frames of a source; lists have one number per dimension."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    q01: list[float]
    q99: list[float]
    mask: list[bool]  # dimensions to normalise; false for the gripper
    count: int  # frames

    @property
    def constant(self) -> list[int]:
        """Dimensions that are constant."""
        return [d for d, (low, high) in enumerate(zip(self.min, self.max, strict=True)) if low == high]

    @property
    def rare(self) -> list[int]:
        """Dimensions that change in so few frames that q01 equals q99, so these cannot be used for scaling."""
        rows = enumerate(zip(self.q01, self.q99, self.min, self.max, strict=True))
        return [d for d, (a, b, low, high) in rows if low < high and _same(a, b, high - low)]

    def for_scaling(self) -> Stats:
        """A copy with min and max replacing the quantiles of `rare` dimensions."""
        rare = self.rare
        q01, q99 = (
            [ends[d] if d in rare else q for d, q in enumerate(qs)]
            for ends, qs in ((self.min, self.q01), (self.max, self.q99))
        )
        return self.model_copy(update={"q01": q01, "q99": q99})


def dimension_names(manifest: Manifest, column: str) -> list[str]:
    """Names of the dimensions: dx dy dz rx ry rz gripper for end-effector deltas, numbers otherwise."""
    if column != "action":
        return [str(d) for d in range(manifest.proprio_dim)]
    names = [str(d) for d in range(manifest.action_dim)]
    if manifest.convention.startswith("end-effector delta") and manifest.action_dim >= 6:
        names[:6] = ["dx", "dy", "dz", "rx", "ry", "rz"]
    elif manifest.convention.startswith("end-effector pose") and manifest.action_dim >= 6:
        names[:6] = ["x", "y", "z", "rx", "ry", "rz"]
    if manifest.gripper is not None:
        names[manifest.gripper] = "gripper"
    return names


def scaling_notes(manifest: Manifest, column: str, stats: Stats) -> list[str]:
    """Notes on dimensions of "action" or "proprio" with special scaling, one line each."""
    names = dimension_names(manifest, column)
    same, few = stats.constant, stats.rare
    notes = []
    if same:
        which = ", ".join(f"{names[d]} (always {stats.min[d]:.3g})" for d in same)
        notes.append(f"{column} {which}: never changes" + ("; a policy gives it back as it was" * (column == "action")))
    if few:
        which = ", ".join(
            f"{names[d]} ({stats.q01[d]:.3g}, from {stats.min[d]:.3g} to {stats.max[d]:.3g})" for d in few
        )
        notes.append(
            f"{column} {which}: moves in so few frames that q01 is q99; a policy's scaling takes min and max instead"
        )
    return notes


class Split(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    episodes: int
    frames: int


class Prefix(BaseModel):
    """The part of an index.json or episodes.jsonl that a manifest counts; growth appends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nbytes: int = Field(ge=0)
    sha256: str


class Size(BaseModel):
    """The size of a source before it grew."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    splits: dict[str, Split]
    stats: dict[str, Stats] = {}
    digest: str  # digest of its manifest without the statistics
    prefixes: dict[str, Prefix] = {}


class Manifest(BaseModel):
    """Content and provenance of a converted source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    name: str
    source_format: str  # e.g. "libero"
    image_size: int
    cameras: list[str]
    splits: dict[str, Split]
    rate_hz: float
    action_dim: int  # 0 for a source without actions
    proprio_dim: int
    convention: str  # what `action` means
    original_action_dim: int = 0
    original_convention: str = ""  # what `original_action` means
    gripper: int | None = None  # which dimension of `action` is the gripper: 1 open, 0 closed
    frame_size: tuple[int, int] | None = None  # (H, W) of the dataset's frames before resizing, if known
    options: dict[str, Any] = {}  # the converter's options
    given: dict[str, Any] = {}  # the format's own options as given by the user
    source_fingerprint: str = ""  # fingerprint of the converted files
    checksums: dict[str, str] = {}  # SPLIT/CAMERA/shard file → sha256
    prefixes: dict[str, Prefix] = {}  # SPLIT/CAMERA/index.json, SPLIT/episodes.jsonl → checksum of what it counts
    tool_version: str = ""
    skipped: list[str] = []  # "EPISODE: reason"
    notes: list[str] = []  # notes: what the converter guessed, left out or did not find
    stats: dict[str, Stats] = {}  # "action", "proprio"; of split train; by `stamo data stats`
    before: list[Size] = []  # its sizes before each growth

    @property
    def episodes(self) -> int:
        return sum(split.episodes for split in self.splits.values())

    @property
    def origin(self) -> str:
        """The digest of its first manifest, unchanged by growth."""
        return self.before[0].digest if self.before else self.digest

    @property
    def digest(self) -> str:
        """Digest of all fields except those that may be added later, and those that earlier versions did not write."""
        dumped = self.model_dump(mode="json", exclude={"stats", "before", "prefixes"})
        return hashlib.sha256(json.dumps(dumped, sort_keys=True).encode()).hexdigest()

    def as_of(self, growth: int | None) -> Manifest:
        """The manifest as it was after `growth` growths; None: the current one.

        Raises:
            DataError: It has grown fewer times.
        """
        if growth is None or growth == len(self.before):
            return self
        if growth > len(self.before):
            raise DataError(f"{self.name}: has grown {len(self.before)} times, not {growth}; another source lies there")
        size = self.before[growth]
        then = {"splits": size.splits, "stats": size.stats, "prefixes": size.prefixes, "before": self.before[:growth]}
        return self.model_copy(update=then)


def read_manifest(source: Path) -> Manifest:
    """Read SOURCE/manifest.json.

    Raises:
        DataError: The folder is missing, empty, unfinished, or of a format this version does not read.
    """
    path = source / MANIFEST
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        if not source.is_dir() and not partial_of(source).is_dir():
            here = "" if source.is_absolute() else f" in {Path.cwd()}"
            hint = "convert a dataset into it with `stamo data convert`"
            raise DataError(f"{source}: no such folder{here}; {hint}") from None
        raise DataError(f"{source}: {_unfinished(source)}") from None
    except ValueError as e:
        raise DataError(f"{path}: not a manifest: {e}") from e
    try:
        raw = json.loads(text)
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version {version}; this version of stamo reads {FORMAT_VERSION}: convert it again"
            )
        manifest = Manifest.model_validate(raw)
        for name in (*manifest.splits, *manifest.cameras):
            check_folder_name(name, str(path))
        return manifest
    except (ValidationError, ValueError, AttributeError) as e:
        raise DataError(f"{path}: not a manifest: {e}") from e


def partial_of(out: Path) -> Path:
    """Where a conversion into the folder OUT keeps what it has done so far."""
    return out.with_name(f".{out.name}.partial")


def has_shards(source: Path) -> bool:
    """Whether a folder is laid out as a converted source, whole or not."""
    return next(source.glob("*/*/index.json"), None) is not None


def _unfinished(source: Path) -> str:
    """What a folder without a manifest is, and what to do."""
    if partial_of(source).is_dir():
        what = "its conversion never finished" if source.is_dir() else "no such folder: its conversion never finished"
        return f"{what}; run the same `stamo data convert` again, it resumes"
    begun = (f"*/{EPISODES}", "*/*/shard.*", "*/*/*/shard.*")  # a copy may have begun with any of these
    if has_shards(source) or any(next(source.glob(part), None) is not None for part in begun):
        return (
            f"has shards but no {MANIFEST}, so its conversion or copy never finished; copy it again, or run "
            "`stamo data convert` with --overwrite"
        )
    if not any(source.iterdir()):
        return "is empty; convert a dataset into it with `stamo data convert`"
    return (
        f"has no {MANIFEST}, so it was not made by `stamo data convert`; a dataset itself is not read: convert it into "
        "another folder (`stamo data convert --help`)"
    )


def read_episodes(source: Path, split: str, count: int | None = None) -> list[Episode]:
    """Read the episode table of one split, in stored order; of a growing source, the first `count`."""
    path = source / split / EPISODES
    try:
        lines = path.read_text().split("\n")[:count]  # texts may contain other line separators
        return [Episode.model_validate_json(line) for line in lines if line]
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {REPAIR}") from None
    except ValidationError as e:
        raise DataError(f"{path}: not an episode table: {e}") from e


def first_entries(entries: list[dict[str, Any]], frames: int) -> list[dict[str, Any]]:
    """The entries of index.json with the first frames; later ones were added by growth. All if no boundary fits."""
    counts = list(accumulate(entry["samples"] for entry in entries))
    return entries[: counts.index(frames) + 1] if frames in counts else entries
