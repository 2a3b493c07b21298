"""Files of JSON lines that only grow, such as metrics.jsonl: read from their end, as the rest may be long.

A line that cannot be read is torn where it is the last and has no end, as a killed process leaves it, and damaged
elsewhere. Free of torch and numpy.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 1 << 18  # bytes read at once
_LONGEST = 1 << 28  # bytes; what is longer is no line
_WHOLE = 1 << 25  # bytes of a file that is read whole where a sample would do
_WITHIN = 1 << 24  # bytes at the end in which the last objects are looked for
_TRIES = 8  # lines in a row of which one is wanted

Object = dict[str, Any]
Wanted = Callable[[Object], bool]


class TooLongError(ValueError):
    """No end of a line far and wide."""


def backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it begins, the line with its end), the last one first; the last may have no end.

    Raises:
        TooLongError: A line of over 256 MiB.
    """
    start, block, size = file.seek(0, os.SEEK_END), b"", _BLOCK
    while start:
        if len(block) > _LONGEST:
            raise TooLongError
        size = min(size, start)
        file.seek(start - size)
        block, start = file.read(size) + block, start - size
        begin = block.find(b"\n", 0, -1) + 1 if start else 0  # the first line may begin further up
        if start and not begin:
            size *= 2
            continue
        end, size = len(block), _BLOCK
        while end > begin:
            first = max(begin, block.rfind(b"\n", begin, end - 1) + 1)
            yield start + first, block[first:end]
            end = first
        block = block[:begin]


def parsed(line: bytes) -> Object | None:
    """The object of a line; None if it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def last_objects(path: Path, wanted: Wanted = bool, within: int | None = _WITHIN) -> Iterator[Object]:
    """Those that are wanted, the last one first; of the last `within` bytes, None: of all. A missing file has none."""
    with contextlib.suppress(OSError, TooLongError), path.open("rb") as f:
        end = f.seek(0, os.SEEK_END)
        for start, line in backwards(f):
            if within is not None and end - start > within:
                return
            found = parsed(line)
            if found is not None and wanted(found):
                yield found


@dataclass(frozen=True)
class Sample:
    """Objects of a file, in its order.

    Attributes:
        objects: Those that were wanted.
        last: Of a long file, how many at the end are all there are; those before stand at equal distances, of a length
            in bytes. None: all of the file are here.
        damaged: Lines that cannot be read, of those that were looked at.
    """

    objects: list[Object]
    last: int | None = None
    damaged: int = 0

    @property
    def even(self) -> list[Object]:
        """Those at equal distances, up to the last one."""
        return self.objects if self.last is None else [*self.objects[: -self.last], *self.objects[-1:]]


def sample(path: Path, wanted: Wanted = bool, points: int = 1200, last: int = 50, whole: int = _WHOLE) -> Sample:
    """All wanted objects of a file of up to `whole` bytes; of a longer one about `points`, and all of the `last`."""
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size <= whole:
                *lines, torn = f.read().split(b"\n")
                found = [parsed(line) for line in lines if line]
                good = [o for o in (*found, parsed(torn)) if o is not None and wanted(o)]
                return Sample(good, damaged=found.count(None))
            tail, end = list[Object](), size
            for start, line in backwards(f):
                here = parsed(line)
                if here is not None and wanted(here):
                    tail, end = [here, *tail], start
                if len(tail) == last or size - start > _WITHIN:
                    break
            even, damaged = _even(f, end, wanted, points)
            return Sample([*even, *tail], len(tail), damaged)
    except (OSError, TooLongError):
        return Sample([])


def _even(f: BinaryIO, end: int, wanted: Wanted, points: int) -> tuple[list[Object], int]:
    """Wanted objects that begin before `end`, and how many lines could not be read."""
    found, damaged, reached, dense = list[Object](), 0, 0, True
    for i in range(points):
        at = i * end // points
        if at < reached:
            dense = True  # within the last line that was read
            continue
        f.seek(reached if dense else at)
        if not dense:
            f.readline(_LONGEST)  # the rest of a line that begins further up
        dense = False
        for _ in range(_TRIES):
            begin = f.tell()
            if begin >= end or begin < reached:
                break
            line = f.readline(_LONGEST)
            reached, here = f.tell(), parsed(line)
            damaged += here is None
            if here is not None and wanted(here):
                found.append(here)
                break
    return found, damaged
