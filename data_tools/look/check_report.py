"""The findings of `stamo data check`, and their display."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.stores.store import write_whole
from stamo_dist.errors import DataError
from stamo_dist.words import counted

ERROR, WARNING = "error", "warning"

#: The checks and what they cover, in the order of the table. Findings name one of these.
CHECKS = {
    "manifest": "manifest.json is whole",
    "table": "episodes.jsonl is whole, contiguous and as the manifest says",
    "index": "index.json is whole and as the schema and the manifest say",
    "file": "shards are there, whole, readable",
    "checksum": "sha256 of the shards",
    "episode": "episodes are contiguous, in one shard, and as episodes.jsonl says",
    "frame": "frames decode at the stated size",
    "number": "actions, proprio and times are finite",
    "time": "times increase, without jumps, at the stated rate",
    "length": "plausible lengths of episodes",
    "blank": "frames that are black or of one colour",
    "frozen": "consecutive frames that are identical",
    "action": "outliers among the actions; gripper between 0 and 1",
    "duplicate": "episodes that occur twice",
    "source": "frames, numbers and texts are those of the dataset (--against)",
}
#: Findings kept and printed per check; all are counted.
KEPT, PRINTED = 100, 3


@dataclass(frozen=True)
class CheckFinding:
    """One problem: an "error", or something implausible, a "warning"."""

    check: str
    severity: str
    text: str
    split: str = ""
    camera: str = ""
    shard: str = ""
    episode: str = ""
    frame: int | None = None
    count: int = 1  # number of similar findings, of which this is the first

    def at(self, split: str, camera: str, shard: str) -> CheckFinding:
        """A copy that names this file."""
        return replace(self, split=split, camera=camera, shard=shard)

    def where(self, source: str) -> str:
        """SOURCE/SPLIT/CAMERA/shard, episode E, frame T."""
        place = "/".join(part for part in (source, self.split, self.camera, self.shard) if part)
        episode = f", episode {self.episode}" if self.episode else ""
        return place + episode + ("" if self.frame is None else f", frame {self.frame}")


@dataclass
class CheckReport:
    """Counts are exact; the first KEPT findings of each check and severity are stored."""

    source: str
    fast: bool = False
    findings: list[CheckFinding] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # check → severity → findings
    looked: dict[str, int] = field(default_factory=dict)  # kind of item → how many were checked
    total: dict[str, int] = field(default_factory=dict)  # kind of item → how many exist
    unseen: list[str] = field(default_factory=list)  # what this run could not or did not check
    unchanged: int = 0  # shards that were verified before

    def add(self, findings: Iterable[CheckFinding]) -> None:
        """Count findings and keep the first ones."""
        for finding in findings:
            counts = self.counts.setdefault(finding.check, {ERROR: 0, WARNING: 0})
            if counts[finding.severity] < KEPT:
                self.findings.append(finding)
            counts[finding.severity] += finding.count

    def look(self, **counts: int) -> None:
        """Count checked items: checksums, frames, …."""
        for what, count in counts.items():
            self.looked[what] = self.looked.get(what, 0) + count

    def number(self, severity: str) -> int:
        """How many errors or warnings there are."""
        return sum(counts[severity] for counts in self.counts.values())

    @property
    def fine(self) -> bool:
        """Whether there are no errors."""
        return not self.number(ERROR)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "errors": self.number(ERROR), "warnings": self.number(WARNING)}

    def shares(self) -> str:
        """Checked items of all, e.g. "frames 30 of 4000 (0.8 %)"."""
        said = []
        for what, total in self.total.items():
            looked = self.looked.get(what, 0)
            share = "" if looked == total else f" ({100 * looked / max(1, total):.2g} %)"
            said.append(f"{what} {looked} of {total}{share}")
        return " · ".join(said)


def write_report(report: CheckReport, path: Path) -> None:
    """Write everything as JSON.

    Raises:
        DataError: It cannot be written.
    """
    try:
        write_whole(path, json.dumps(report.to_dict(), indent=2).encode() + b"\n")
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror or e}") from e


def print_report(report: CheckReport) -> None:
    """Print a table of the checks, then for each kind of finding its number and the first ones."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from stamo_dist.tables import show

    console = Console(soft_wrap=True, highlight=False)
    table = Table(title=escape(report.source), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("check", no_wrap=True)
    table.add_column("errors", justify="right", no_wrap=True)
    table.add_column("warnings", justify="right", no_wrap=True)
    table.add_column("what")
    for check, what in CHECKS.items():
        if check == "source" and "compared" not in report.total:
            continue
        counts = report.counts.get(check, {ERROR: 0, WARNING: 0})
        errors, warnings = counts[ERROR], counts[WARNING]
        table.add_row(
            check, f"[red]{errors}[/]" if errors else "–", f"[yellow]{warnings}[/]" if warnings else "–", what
        )
    show(console, table)
    for check, what in CHECKS.items():
        for severity, colour in ((ERROR, "red"), (WARNING, "yellow")):
            found = [f for f in report.findings if (f.check, f.severity) == (check, severity)]
            if found:
                console.print(f"[{colour}]{severity}[/] {check}: {report.counts[check][severity]} ({what})")
            for finding in found[:PRINTED]:
                console.print(f"  {escape(finding.where(report.source))}: {escape(finding.text)}")
            shown = sum(finding.count for finding in found[:PRINTED])
            if found and (rest := report.counts[check][severity] - shown):
                console.print(f"  … and {rest} more")
    if report.total:
        sampled = " (sampled: --fast)" if report.fast else ""
        console.print(f"looked at{sampled}: {report.shares()}")
    for unseen in report.unseen:
        console.print(f"not looked at: {escape(unseen)}")
    if report.unchanged:
        console.print(f"verified before, and unchanged since: {counted(report.unchanged, 'shard')}")
    verdict = f"{counted(report.number(ERROR), 'error')}, {counted(report.number(WARNING), 'warning')}"
    console.print(f"[{'green' if report.fine else 'red'}]{verdict}[/]")
