"""`stamo data check`: whether a converted source is intact and plausible.

Errors would break training or teach it wrong data; warnings should be looked at by a person.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.look.check_report import ERROR, KEPT, WARNING, CheckFinding, CheckReport
from data_tools.look.check_shard import Extreme, ShardFindings, ShardTask, as_entries, look
from data_tools.look.check_table import Table
from data_tools.look.columns import INDEX, IndexedShard
from data_tools.look.each_shard import frames_bar, in_order, index_name, processes_for, shards_of, store_at
from data_tools.look.sketch import RELATIVE_ERROR
from data_tools.look.stats import Sums, merge
from data_tools.stores.store import Store, at_hand
from data_tools.stores.sync import fetch_manifest
from data_tools.stores.verified import Verified
from stamo_dist.data.agreement import altered, disagreements
from stamo_dist.data.schema import EPISODES, MANIFEST, Episode, Manifest, dimension_names
from stamo_dist.errors import DataError

if TYPE_CHECKING:
    from data_tools.look.check_source import Original, SourceTask

#: With `fast`, one shard in this many, and the first of each camera, is checked in full.
SAMPLE_EVERY = 10
#: An action is an outlier if it differs from the median by more than this many scales.
OUTLIER_SCALES = 20.0
#: Outliers kept per dimension.
OUTLIERS = 8


def check(
    source: str,
    *,
    split: str | None = None,
    fast: bool = False,
    against: Path | None = None,
    set: Sequence[str] = (),
    processes: int | None = None,
    cache: Path | None = None,
    quiet: bool = False,
) -> CheckReport:
    """Verify a source.

    Args:
        source: Folder or URL.
        split: Only this one; all when omitted.
        fast: Check a sample: three frames of every episode, the checksums of one shard in ten.
        against: The dataset it was converted from, to be compared with.
        set: Options of its format as KEY=VALUE, if they differ from the manifest's.
        processes: Processes to use; one per core on large sources when omitted.
        cache: Folder for the record of verified shards when the source cannot hold it.
        quiet: No progress bar.

    Returns:
        All findings. Damage of the source is reported, not raised.

    Raises:
        DataError: There is no such source or split, or it cannot be reached; `against` is not such a dataset.
    """
    store = store_at(source)
    report = CheckReport(source.rstrip("/"), fast)
    if store.local is not None and not store.local.is_dir():
        raise DataError(f"{source}: no such folder")
    if store.local is None and store.stat(MANIFEST) is None:
        raise DataError(f"{source}: has no {MANIFEST}, so there is no whole source; check the URL")
    try:
        manifest, _ = fetch_manifest(store)
    except DataError as e:
        report.add([CheckFinding("manifest", ERROR, str(e).split(f"{MANIFEST}: ", 1)[-1], shard=MANIFEST)])
        return report
    if split is not None and split not in manifest.splits:
        raise DataError(f"{source}: has no split {split!r}, only {', '.join(manifest.splits) or 'none'}")
    checked = _Check(store, source, manifest, report, fast, Verified(store, cache))
    checked.run(split, processes, quiet)
    if against is not None:
        checked.compare(against, set, split, processes, quiet)
    return report


class _Check:
    """One run over the splits of a source."""

    def __init__(
        self, store: Store, source: str, manifest: Manifest, report: CheckReport, fast: bool, record: Verified
    ):
        self.store, self.source, self.manifest = store, source, manifest
        self.report, self.fast, self.record = report, fast, record
        self.actions: Sums | None = None
        self.extremes: list[Extreme] = []
        self.tables: dict[str, Table] = {}
        # Per episode: number of its split, first sample and fingerprint, for finding duplicates.
        self.episodes = (array("b"), array("q"), array("Q"))

    def run(self, split: str | None, processes: int | None, quiet: bool) -> None:
        """Fill the report."""
        splits = [split] if split else list(self.manifest.splits)
        self.report.unseen = list(_unseen(self.manifest, splits))
        if not splits or not self.manifest.cameras:
            self.report.add([CheckFinding("manifest", ERROR, "lists no splits or no cameras", shard=MANIFEST)])
            return
        with ExitStack() as stack:
            work = [self._plan(split, camera, stack) for split in splits for camera in self.manifest.cameras]
            frames = sum(self.manifest.splits[split].frames for split in splits) * len(self.manifest.cameras)
            count = sum(len(shards) for _, _, shards in work)
            self.report.total = {"frames": frames, "checksums": count}
            processes = processes_for(sum(shard.nbytes for _, _, shards in work for shard in shards), processes)
            with frames_bar("check", frames, quiet) as advance:
                names = [(s, c, shard.name, shard.samples) for s, c, shards in work for shard in shards]
                results = in_order(look, self._tasks(work), processes)
                for n, ((of, camera, name, samples), looked) in enumerate(zip(names, results, strict=True)):
                    self._take(of, camera, name, looked)
                    advance(samples)
                    if n % 64 == 63:
                        self.record.save()
            self.record.save()
            self._outliers()
            self._duplicates()

    def compare(self, src: Path, set: Sequence[str], split: str | None, processes: int | None, quiet: bool) -> None:
        """Compare with the dataset that it was converted from."""
        from data_tools.look import check_source

        original, findings = check_source.open_original(self.manifest, src, set)
        self.report.add(findings)
        splits = [split] if split else list(self.manifest.splits)
        pictures = check_source.PICTURES_FAST if self.fast else check_source.PICTURES
        self.report.unseen[0] = f"frames other than {pictures} of each episode and camera, beside those of {src}"
        if original.told:
            self.report.unseen.append("whether instructions are those of the table they were given in")
        with ExitStack() as stack:
            tables = {of: self._rows(of, stack) for of in splits}
            self.report.add(check_source.left_out(original, self.manifest, tables))
            tasks = list(self._comparisons(original, tables, pictures))
            frames = sum(task.shard.samples for task in tasks)
            processes = processes_for(sum(task.shard.nbytes for task in tasks), processes)
            with frames_bar("compare", frames, quiet) as advance:
                for task, compared in zip(tasks, in_order(check_source.compare, tasks, processes), strict=True):
                    self.report.add(compared.findings)
                    self.report.look(compared=compared.pictures)
                    advance(task.shard.samples)
        self.report.total["compared"] = self.report.total.get("frames", 0)

    def _rows(self, split: str, stack: ExitStack) -> list[Episode]:
        name = f"{split}/{EPISODES}"
        try:
            return list(Table(stack.enter_context(at_hand(self.store, name))).lines())
        except DataError:
            return []  # found broken before

    def _comparisons(
        self, original: Original, tables: Mapping[str, list[Episode]], pictures: int
    ) -> Iterator[SourceTask]:
        from data_tools.look.check_source import SourceTask

        refs = original.episodes
        bare = replace(original, scan=replace(original.scan, episodes=[], files=[], bad=[], notes=[]))
        for split, rows in tables.items():
            starts = [row.start for row in rows]
            for camera in self.manifest.cameras:
                try:
                    shards = shards_of(self.store, split, camera)
                except DataError:
                    continue  # found broken before
                begin = 0
                for shard in shards:
                    here = rows[bisect_left(starts, begin) : bisect_left(starts, begin + shard.samples)]
                    yield SourceTask(
                        source=self.source,
                        split=split,
                        camera=camera,
                        shard=shard,
                        begin=begin,
                        rows=here,
                        refs={row.id: refs[row.id] for row in here if row.id in refs},
                        original=bare,
                        proprio_dim=self.manifest.proprio_dim,
                        pictures=pictures,
                        vectors=camera == self.manifest.cameras[0],
                    )
                    begin += shard.samples

    def _plan(self, split: str, camera: str, stack: ExitStack) -> tuple[str, str, list[IndexedShard]]:
        """The shards of one camera, none if its index is broken; also checks the index and the table."""
        if split not in self.tables:
            name = f"{split}/{EPISODES}"
            there = self.store.local is not None or self.store.stat(name) is not None
            table = Table(stack.enter_context(at_hand(self.store, name)) if there else None)
            self.tables[split] = table
            self.report.add(table.check(split, self.manifest.splits[split]))
            if table.whole and (problem := altered(self.store.read(name), name, self.manifest)):
                self.report.add([CheckFinding("table", ERROR, problem, split=split, shard=EPISODES)])
        try:
            shards = shards_of(self.store, split, camera)
        except DataError as e:
            text = str(e).split(f"{INDEX}: ", 1)[-1]
            self.report.add([CheckFinding("index", ERROR, text).at(split, camera, INDEX)])
            return split, camera, []
        self.report.add(self._check_index(split, camera, shards))
        return split, camera, shards

    def _check_index(self, split: str, camera: str, shards: list[IndexedShard]) -> Iterator[CheckFinding]:
        frames, expected = sum(shard.samples for shard in shards), self.manifest.splits[split].frames
        if frames != expected:
            text = f"counts {frames} frames, the manifest {expected}"
            yield CheckFinding("index", ERROR, text).at(split, camera, INDEX)
        name = index_name(split, camera)
        problems = disagreements(((shard.name, shard.sha256) for shard in shards), self.manifest, split, camera)
        problems += [altered(self.store.read(name), name, self.manifest)] if not problems else []
        for problem in filter(None, problems):
            yield CheckFinding("index", ERROR, problem).at(split, camera, INDEX)

    def _tasks(self, work: list[tuple[str, str, list[IndexedShard]]]) -> Iterator[ShardTask]:
        small = self.manifest.model_copy(update={"checksums": {}, "skipped": [], "stats": {}, "options": {}})
        for split, camera, shards in work:
            edges = list(accumulate((shard.samples for shard in shards), initial=0))
            table = self.tables[split]
            rows = table.within(edges) if table.whole else repeat(None)
            for number, (shard, begin, touching) in enumerate(zip(shards, edges, rows, strict=False)):
                name = f"{split}/{camera}/{shard.name}"
                yield ShardTask(
                    self.source,
                    split,
                    camera,
                    shard,
                    begin,
                    touching,
                    small,
                    self.manifest.checksums.get(name, ""),
                    self.fast,
                    number == 0 or sha256(name.encode()).digest()[0] % SAMPLE_EVERY == 0,
                    self.record.get(name),
                    camera == self.manifest.cameras[0],
                )

    def _take(self, split: str, camera: str, name: str, looked: ShardFindings) -> None:
        """Add one shard's result to the report."""
        file = f"{split}/{camera}/{name}"
        self.report.add(looked.findings)
        self.report.look(frames=looked.frames, checksums=looked.checksums)
        self.report.unchanged += looked.unchanged
        if looked.verified is not None:
            stat, depth, found = looked.verified
            self.record.add(file, stat, self.manifest.checksums[file], depth, findings=as_entries(found))
        elif any(finding.severity == ERROR for finding in looked.findings):
            self.record.forget(file)
        if looked.actions is not None:
            self.actions = merge(self.actions, looked.actions)
            self.extremes = _furthest([*self.extremes, *looked.extremes])
        splits, starts, prints = self.episodes
        splits.extend(repeat(list(self.manifest.splits).index(split), len(looked.starts)))
        starts.extend(looked.starts.tolist())
        prints.extend(looked.fingerprints.tolist())

    def _outliers(self) -> None:
        if self.actions is None:
            return
        moments, quantiles = self.actions
        q05, q25, median, q75, q95 = quantiles.at((0.05, 0.25, 0.5, 0.75, 0.95), moments)
        # In standard deviations of a normal distribution. If a dimension rests most of the time, its quartiles lie
        # close together, so the tails are used too.
        scale = np.maximum((q75 - q25) / 1.349, (q95 - q05) / 3.290)
        scale = np.where(scale > 0, scale, moments.std)
        if self.manifest.gripper is not None:
            scale[self.manifest.gripper] = np.inf
        # At least a bin's width, so that a constant dimension has no outliers.
        far = np.maximum(OUTLIER_SCALES * scale, 2 * RELATIVE_ERROR * np.abs(median))
        counts = quantiles.outside(median - far, median + far)
        names = dimension_names(self.manifest, "action")
        for d in np.flatnonzero(counts).tolist():
            worst = [x for x in self.extremes if x.dimension == d]
            worst.sort(key=lambda x: -abs(x.value - median[d]))
            for n, x in enumerate(worst[: min(KEPT, int(counts[d]))]):
                text = (
                    f"{names[d]} is {x.value:.4g}, {abs(x.value - median[d]) / scale[d]:.0f} scales from the median "
                    f"{median[d]:.4g}"
                )
                count = int(counts[d]) - min(len(worst), int(counts[d])) + 1 if n == 0 else 1
                finding = CheckFinding("action", WARNING, text, episode=x.episode, frame=x.frame, count=count)
                self.report.add([finding.at(x.split, x.camera, x.shard)])

    def _duplicates(self) -> None:
        splits = list(self.manifest.splits)
        of, starts, prints = (np.array(values) for values in self.episodes)
        _, group, size = np.unique(prints, return_inverse=True, return_counts=True)
        again = np.flatnonzero(size[group] > 1).tolist()
        names = self._ids({(splits[of[n]], int(starts[n])) for n in again})
        first: dict[int, tuple[str, str]] = {}
        for n in again:
            split, begin = splits[of[n]], int(starts[n])
            name = names.get((split, begin), f"at sample {begin}")
            if (other := first.setdefault(int(group[n]), (split, name))) == (split, name):
                continue
            leak = f" of split {other[0]}: what is held out is also trained on" if other[0] != split else ""
            text = f"has the frames and actions of episode {other[1]}{leak}"
            self.report.add([CheckFinding("duplicate", WARNING, text, split=split, episode=name)])

    def _ids(self, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], str]:
        """The names of the episodes that begin at these samples."""
        found: dict[tuple[str, int], str] = {}
        for split, table in self.tables.items():
            if table.whole:
                found |= {(split, row.start): row.id for row in table.rows() if (split, row.start) in wanted}
        return found


def _unseen(manifest: Manifest, splits: list[str]) -> Iterator[str]:
    """What the checks of these splits do not cover."""
    yield "whether frames, actions and instructions are those of the dataset it was converted from"
    if others := [split for split in manifest.splits if split not in splits]:
        yield f"split {', '.join(others)}"
    if manifest.proprio_dim:
        yield "outliers of the proprioception"
    if manifest.skipped:
        yield f"{len(manifest.skipped)} episodes that were skipped while converting"


def _furthest(extremes: list[Extreme]) -> list[Extreme]:
    """The OUTLIERS smallest and largest actions of each dimension."""
    kept = []
    for dimension in {x.dimension for x in extremes}:
        ordered = sorted((x for x in extremes if x.dimension == dimension), key=lambda x: x.value)
        kept += ordered if len(ordered) <= 2 * OUTLIERS else ordered[:OUTLIERS] + ordered[-OUTLIERS:]
    return kept
