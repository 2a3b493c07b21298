"""Checking episodes.jsonl, which is read line by line, as it may be long."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from data_tools.look.check_report import ERROR, WARNING, CheckFinding
from data_tools.look.check_rules import EpisodeRow
from stamo_dist.data.schema import EPISODES, Episode, Split
from stamo_dist.errors import DataError

#: An episode is suspiciously long or short if its length differs from the median by this factor.
LENGTH_FACTOR = 20


@dataclass
class Table:
    """The episode table of one split; `whole`: it is intact and can be compared with the shards."""

    path: Path | None  # None: the file is missing
    whole: bool = True
    episodes: int = 0

    def rows(self) -> Iterator[EpisodeRow]:
        """Position of each episode; raises as `lines` does."""
        return (EpisodeRow(e.id, e.start, e.length, {0: e.instruction, **e.later_instructions}) for e in self.lines())

    def lines(self) -> Iterator[Episode]:
        """The lines of the table.

        Raises:
            DataError: It is missing, or a line is broken; names it.
        """
        if self.path is None:
            raise DataError("missing")
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _parse(number, line)
        except FileNotFoundError:
            raise DataError("missing") from None
        except OSError as e:
            raise DataError(f"cannot be read: {e.strerror or e}") from e

    def within(self, edges: list[int]) -> Iterator[list[EpisodeRow]]:
        """For each shard k, samples edges[k] to edges[k + 1], the rows that overlap it. Needs an intact table."""
        rows = self.rows()
        held: list[EpisodeRow] = []
        for begin, end in pairwise(edges):
            held = [row for row in held if row.start + row.length > begin]
            while not held or held[-1].start + held[-1].length < end:
                if (row := next(rows, None)) is None:
                    break
                held.append(row)
            yield [row for row in held if row.start < end]

    def check(self, split: str, counts: Split) -> Iterator[CheckFinding]:
        """Check that lines are intact, contiguous, unique, as many as the manifest states; lengths are plausible."""
        lengths, names, end = array("q"), array("Q"), 0
        try:
            for row in self.rows():
                if row.start != end:
                    self.whole = False
                    text = f"starts at sample {row.start}, but the episode before it ends at {end}"
                    yield CheckFinding("table", ERROR, text, split=split, shard=EPISODES, episode=row.id)
                end = row.start + row.length
                lengths.append(row.length)
                digest = hashlib.blake2b(row.id.encode(), digest_size=8).digest()
                names.append(int.from_bytes(digest, "little"))
        except DataError as e:
            self.whole = False
            yield CheckFinding("table", ERROR, str(e), split=split, shard=EPISODES)
            return
        self.episodes = len(lengths)
        found = Split(episodes=len(lengths), frames=sum(lengths))
        if found != counts:
            text = (
                f"has {found.episodes} episodes of {found.frames} frames, the manifest says {counts.episodes} of "
                f"{counts.frames}"
            )
            yield CheckFinding("table", ERROR, text, split=split, shard=EPISODES)
        _, first, times = np.unique(np.array(names, np.uint64), return_index=True, return_counts=True)
        for n, count in zip(first[times > 1].tolist(), times[times > 1].tolist(), strict=True):
            yield CheckFinding(
                "table", ERROR, f"is listed {count} times", split=split, shard=EPISODES, episode=self.row(n).id
            )
        yield from self._lengths(split, np.array(lengths, np.int64))

    def row(self, number: int) -> EpisodeRow:
        """One of the rows."""
        return next(islice(self.rows(), number, None))

    def _lengths(self, split: str, lengths: np.ndarray) -> Iterator[CheckFinding]:
        if not len(lengths):
            return
        median = float(np.median(lengths))
        for what, odd in (
            ("has a single frame", lengths == 1),
            (f"is over {LENGTH_FACTOR} times as long as the median", lengths > LENGTH_FACTOR * median),
            (f"is over {LENGTH_FACTOR} times shorter than the median", (lengths * LENGTH_FACTOR < median)),
        ):
            found = np.flatnonzero(odd)
            if len(found):
                row = self.row(int(found[0]))
                text = f"{what}: {row.length} frames, the median is {median:g}"
                yield CheckFinding(
                    "length", WARNING, text, split=split, shard=EPISODES, episode=row.id, count=len(found)
                )


def _parse(number: int, line: bytes) -> Episode:
    try:
        return Episode.model_validate_json(line)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise DataError(f"line {number}: {f'{field}: ' if field else ''}{first['msg']}") from None
