"""Reading append-only files of JSON lines, such as metrics.jsonl, from the end, as they may be long.

An unreadable line is torn if it is the last and has no line end (left by a killed process), and damaged
otherwise. Free of torch and numpy.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK = 1 << 16  # bytes read at once
_LONGEST = 1 << 28  # maximum bytes of a line
_WHOLE = 1 << 25  # files up to this many bytes are read completely instead of sampled
_WITHIN = 1 << 24  # bytes at the end that are searched for the last objects
_TRIES = 8  # consecutive lines tried for a wanted one

Object = dict[str, Any]
Wanted = Callable[[Object], bool]


class TooLongError(ValueError):
    """A line exceeds the maximum length."""


def backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its line end), last line first; the last may have no line end.

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
        begin = block.find(b"\n", 0, -1) + 1 if start else 0  # its first line may begin in an earlier block
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
    """The JSON object of a line; None if it is not one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def last_objects(path: Path, wanted: Wanted = bool, within: int | None = _WITHIN) -> Iterator[Object]:
    """The wanted objects, last first, within the last `within` bytes (None: all). A missing file has none."""
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
        objects: The wanted objects.
        last: For a long file, the number of objects at the end that are complete; earlier ones are sampled at equal
            distances in bytes. None: the file was read completely.
        damaged: Number of unreadable lines among those read.
    """

    objects: list[Object]
    last: int | None = None
    damaged: int = 0

    @property
    def even(self) -> list[Object]:
        """The evenly spaced objects, up to the last one."""
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
    """Evenly spaced wanted objects that begin before `end`, and the number of unreadable lines."""
    found, damaged, reached, dense = list[Object](), 0, 0, True
    for i in range(points):
        at = i * end // points
        if at < reached:
            dense = True  # inside the line read last
            continue
        f.seek(reached if dense else at)
        if not dense:
            f.readline(_LONGEST)  # the rest of a line that begins earlier
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
