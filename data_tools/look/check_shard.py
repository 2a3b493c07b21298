"""All checks of one shard, in a process of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_tools.look import check_rules as rules
from data_tools.look.check_report import ERROR, WARNING, CheckFinding
from data_tools.look.check_rules import EpisodeRow, EpisodeRun
from data_tools.look.columns import ColumnShard, IndexedShard
from data_tools.look.each_shard import store_at
from data_tools.look.stats import Sums, sums_of
from data_tools.stores.store import Stat, at_hand, sha256_of
from data_tools.stores.verified import BYTES, FRAMES, Entry, holds
from stamo_dist.data.schema import Manifest
from stamo_dist.errors import DataError

#: Largest and smallest actions kept per dimension.
EXTREMES = 4


@dataclass(frozen=True)
class ShardTask:
    """One shard to check."""

    source: str
    split: str
    camera: str
    shard: IndexedShard
    begin: int  # its first sample in the split
    rows: list[EpisodeRow] | None  # lines of episodes.jsonl that overlap it; None if that file is broken
    manifest: Manifest
    sha256: str  # by the manifest
    fast: bool
    sampled: bool  # checked in full despite `fast`
    known: Entry | None  # what was recorded when it was verified
    vectors: bool  # also check the columns that are equal in all cameras

    @property
    def name(self) -> str:
        return f"{self.split}/{self.camera}/{self.shard.name}"


@dataclass(frozen=True)
class Extreme:
    """An extreme value of one action dimension, with its episode and frame."""

    dimension: int
    value: float
    split: str
    camera: str
    shard: str
    episode: str
    frame: int


@dataclass
class ShardFindings:
    """The result of checking a shard."""

    findings: list[CheckFinding] = field(default_factory=list)
    frames: int = 0  # decoded
    checksums: int = 0
    episodes: int = 0
    verified: tuple[Stat, str, list[CheckFinding]] | None = None  # to be recorded: stat, depth, findings about images
    unchanged: bool = False  # verified before
    actions: Sums | None = None
    extremes: list[Extreme] = field(default_factory=list)
    fingerprints: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))  # of its episodes
    starts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # their first samples in the split


def look(task: ShardTask) -> ShardFindings:
    """Check one shard; damage is returned as findings, not raised."""
    looked = ShardFindings()
    try:
        _look(task, looked)
    except DataError as e:
        reason = str(e).split(f"{task.shard.name}: ", 1)[-1]
        looked.findings.append(CheckFinding("file", ERROR, reason))
    looked.findings = [finding.at(task.split, task.camera, task.shard.name) for finding in looked.findings]
    return looked


def _look(task: ShardTask, looked: ShardFindings) -> None:
    store = store_at(task.source)
    stat = store.stat(task.name)
    if stat is None:
        looked.findings.append(CheckFinding("file", ERROR, "missing"))
        return
    if stat.size != task.shard.nbytes:
        text = f"{stat.size} bytes, but index.json says {task.shard.nbytes}"
        looked.findings.append(CheckFinding("file", ERROR, text))
        return
    looked.unchanged = holds(task.known, stat, task.sha256, FRAMES)
    if store.local is None and task.fast and not task.sampled:
        return
    with at_hand(store, task.name) as path:
        right = _check_bytes(task, stat, path, looked)
        fine = _check_content(task, ColumnShard(task.shard.spec(path)), looked)
    if right and task.sha256 and not looked.unchanged:
        whole = fine is not None and not task.fast
        looked.verified = (stat, FRAMES if whole else BYTES, fine or [])


def _check_bytes(task: ShardTask, stat: Stat, path: Path, looked: ShardFindings) -> bool:
    """Whether the checksum was computed and is right."""
    if task.sha256 and task.shard.sha256 and task.sha256 != task.shard.sha256:
        text = f"index.json says sha256 {task.shard.sha256[:12]}…, the manifest {task.sha256[:12]}…"
        looked.findings.append(CheckFinding("checksum", ERROR, text))
    expected = task.sha256 or task.shard.sha256
    if not expected:
        looked.findings.append(CheckFinding("checksum", WARNING, "neither the manifest nor index.json has its sha256"))
        return False
    known = holds(task.known, stat, task.sha256)
    if not known and task.fast and not task.sampled:
        return False
    looked.checksums = 1
    if not known and (digest := sha256_of(path)) != expected:
        text = f"its sha256 is {digest[:12]}…, but {expected[:12]}… was written: damaged; convert or sync it again"
        looked.findings.append(CheckFinding("checksum", ERROR, text))
        return False
    return True


def _check_content(task: ShardTask, shard: ColumnShard, looked: ShardFindings) -> list[CheckFinding] | None:
    """Run all rules; returns the findings about images, None if a frame is damaged."""
    layout, manifest = shard.spec.layout, task.manifest
    if problems := list(rules.check_columns(layout.names, layout.encodings, manifest)):
        looked.findings += [CheckFinding("index", ERROR, problem) for problem in problems]
        return None
    runs = rules.runs_of(shard)
    looked.episodes = len(runs)
    looked.findings += rules.check_layout(shard, runs, manifest, task.camera, task.begin, task.rows)
    looked.findings += rules.check_times(shard, runs, manifest.rate_hz)
    looked.findings += rules.check_numbers(
        shard, runs, ["time", *(name for name in rules.VECTORS if name in layout.names)]
    )
    if task.vectors:
        looked.findings += rules.check_gripper(shard, runs, manifest.gripper)
        looked.fingerprints = rules.fingerprints(shard, runs)
        looked.starts = task.begin + np.array([run.first for run in runs], np.int64)
        if manifest.action_dim:
            looked.actions, looked.extremes = _actions(task, shard, runs)
    images = _check_images(task, shard, runs, looked)
    looked.findings += images
    return None if any(finding.severity == ERROR for finding in images) else images


def _check_images(
    task: ShardTask, shard: ColumnShard, runs: list[EpisodeRun], looked: ShardFindings
) -> list[CheckFinding]:
    if looked.unchanged and task.known:
        looked.frames = len(shard)
        return [CheckFinding(**finding) for finding in task.known.get("findings", [])]
    chosen = rules.chosen_frames(runs, task.fast)
    looked.frames = len(chosen)
    frames = list(rules.check_frames(shard, runs, chosen, task.manifest.image_size))
    # An entirely black episode is also frozen: report it once.
    blank = {finding.episode for finding in frames if finding.check == "blank" and finding.count > 1}
    frozen = rules.check_frozen(shard, runs, task.fast, task.manifest.rate_hz)
    return [*frames, *(finding for finding in frozen if finding.episode not in blank)]


def as_entries(findings: list[CheckFinding]) -> list[dict[str, object]]:
    """Findings in the form in which they are recorded."""
    return [asdict(finding) for finding in findings]


def _actions(task: ShardTask, shard: ColumnShard, runs: list[EpisodeRun]) -> tuple[Sums | None, list[Extreme]]:
    values = shard.vectors("action").astype(np.float32)
    finite = np.isfinite(values).all(1)
    if not finite.any():
        return None, []
    owner = np.repeat(np.arange(len(runs)), [run.length for run in runs])
    extremes = []
    for dimension in range(values.shape[1]):
        order = np.argsort(np.where(finite, values[:, dimension], np.nan), kind="stable")[: finite.sum()]
        for i in sorted({*order[:EXTREMES].tolist(), *order[-EXTREMES:].tolist()}):
            run = runs[owner[i]]
            place = (task.split, task.camera, task.shard.name, run.episode, i - run.first)
            extremes.append(Extreme(dimension, float(values[i, dimension]), *place))
    return sums_of(values[finite]), extremes
