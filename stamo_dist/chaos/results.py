"""Results of chaos: one JSON line per training, and the tables made of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stamo_dist import tables
from stamo_dist.chaos.compare import IDENTICAL, NOT, UNFINISHED, WITHIN
from stamo_dist.chaos.trial import Injected

FILE = "results.jsonl"
_GRADES = (IDENTICAL, WITHIN, UNFINISHED, NOT)
_WORDS = ("losses", "between sizes")
_MOMENTS = (
    "queued again",
    "starting",
    "training",
    "saving",
    "leaving",
    "leaving, after the save",
    "between starts",
    "converting",
)


@dataclass
class Result:
    """One training, or all conversions of one call, under faults."""

    what: str  # strategy, or "convert"
    processes: str  # "2", or "1, 2" if starts had different numbers
    seed: int
    starts: int
    faults: list[Injected]
    redone: int  # steps
    lost: int  # samples
    repeated: int  # samples
    losses: str
    deviation: float = 0.0  # from the nearest undisturbed training with equal numbers of processes in each step
    spread: float = 0.0  # between those undisturbed trainings
    between: float = 0.0  # between undisturbed trainings on different numbers of processes
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems


def append(out: Path, result: Result) -> None:
    with (out / FILE).open("a") as f:
        f.write(json.dumps(asdict(result)) + "\n")


def read(out: Path) -> list[Result]:
    """All results of a folder, of all calls."""
    try:
        lines = (out / FILE).read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [Result(**{**row, "faults": [Injected(**fault) for fault in row["faults"]]}) for row in rows]


def show(results: list[Result], console: Console) -> None:
    """Print two tables and the failures."""
    if not results:
        return
    for table in (_kinds([fault for result in results for fault in result.faults]), _trainings(results)):
        tables.show(console, tables.Whole(table))
    for result in results:
        for problem in result.problems:
            console.print(f"PROBLEM: {result.what} on {result.processes}, seed {result.seed}: {problem}", markup=False)


def _kinds(faults: list[Injected]) -> Table:
    table = _table(f"{len(faults)} faults")
    counts = Counter((f.whom, f.what, f.moment) for f in faults)
    moments = [m for m in _MOMENTS if any(moment == m for _, _, moment in counts)]
    table.add_column("")
    for moment in moments:
        table.add_column(moment, justify="right")
    for whom, what in sorted({(whom, what) for whom, what, _ in counts}):
        table.add_row(f"{whom}: {what}", *(str(counts[whom, what, m] or "·") for m in moments))
    table.add_row("all", *(str(sum(n for (_, _, at), n in counts.items() if at == m)) for m in moments))
    return table


def _trainings(results: list[Result]) -> Table:
    table = _table("compared with what was left alone")
    for name in ("", "processes", "trainings", "starts", "faults", "redone", "lost", "repeated", *_WORDS):
        table.add_column(name, justify="left" if name in ("", "processes", *_WORDS) else "right")
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.what, result.processes), []).append(result)
    for (what, processes), group in groups.items():
        far, spread, between = (max(getattr(r, name) for r in group) for name in ("deviation", "spread", "between"))
        losses = max((r.losses for r in group), key=_GRADES.index) + (f" ({far:.1e} of {spread:.1e})" if far else "")
        table.add_row(what, processes, *_sums(group), losses, f"{between:.1e}" if between else "")
    table.add_row("all", "", *_sums(results), "" if all(r.good for r in results) else "PROBLEMS")
    table.caption = (
        "redone: steps; lost, repeated: samples, in the history that counts\n"
        "losses: beside a training that was left alone, on as many processes in each step\n"
        "between sizes: how far trainings that were left alone differ, relative, on different numbers of processes"
    )
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left", caption_justify="left"
    )


def _sums(group: list[Result]) -> list[str]:
    rows = [(1, r.starts, len(r.faults), r.redone, r.lost, r.repeated) for r in group]
    return [str(sum(column)) for column in zip(*rows, strict=True)]
