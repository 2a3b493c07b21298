"""The episode table of a split as columns with the fields that training needs: 16 MB for 10⁶ episodes."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from stamo_dist.data.column_file import ColumnFile, write
from stamo_dist.data.schema import EPISODES, REPAIR, Episode
from stamo_dist.errors import DataError

_log = logging.getLogger(__name__)
_COLUMNS = ("starts", "lengths", "text", "changes")
_LARGE = 1 << 24  # tables of at least this many bytes have their columns cached


@dataclass(frozen=True)
class EpisodeColumns:
    """Columns of N episodes, in stored order.

    Attributes:
        path: Path of the table.
        starts, lengths: int64 (N,): first sample within the split, frames.
        texts: The distinct instructions, as stored.
        text: int32 (N,), index into `texts` for the first frame of each episode.
        changes: int64 (C, 3): an episode, the frame from which its instruction changes, index into `texts`.
    """

    path: Path
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    texts: list[str]
    text: NDArray[np.int32]
    changes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def spans(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """For each range of one instruction, ascending: first sample, episode, index into `texts`; int64 (S,)."""
        episode, frame, text = self.changes.T
        inside = frame < self.lengths[episode]
        own = np.arange(len(self))
        begins = np.concatenate([self.starts, (self.starts[episode] + frame)[inside]])
        order = np.argsort(begins, kind="stable")
        order = (
            order[np.append(np.diff(begins[order]) > 0, True)] if len(order) else order
        )  # a change at frame 0 overrides `text`
        return (
            begins[order],
            np.concatenate([own, episode[inside]])[order],
            np.concatenate([self.text, text[inside]])[order],
        )

    def packed(self, number: int) -> tuple[list[Any], dict[str, NDArray[Any]]]:
        """As table `number` of a ColumnFile: a part of its head, and arrays."""
        return [str(self.path), self.texts], {f"{number}/{column}": getattr(self, column) for column in _COLUMNS}

    @classmethod
    def unpacked(cls, head: Sequence[Any], file: ColumnFile, number: int) -> EpisodeColumns:
        """The inverse of `packed`; the arrays stay in the file."""
        path, texts = head
        return cls(Path(path), texts=texts, **{column: file[f"{number}/{column}"] for column in _COLUMNS})

    def ids(self, episodes: Sequence[int]) -> list[str]:
        """Ids of some episodes, read from the table."""
        with self.path.open("rb") as f:
            lines = (line for line in f if line.strip())
            wanted = set(episodes)
            last = max(wanted, default=-1) + 1
            return [Episode.model_validate_json(line).id for i, line in enumerate(islice(lines, last)) if i in wanted]


def read_columns(source: Path, split: str, count: int | None = None) -> EpisodeColumns:
    """As `read_episodes`: the first `count` episodes of a split, all when omitted; one record in memory at a time.

    Raises:
        DataError: The table is missing or damaged.
    """
    path = source / split / EPISODES
    starts, lengths, text, changes = array("q"), array("q"), array("i"), array("q")
    number: dict[str, int] = {}
    try:
        with path.open("rb") as f:
            for line in islice(f, count):
                if not line.strip():
                    continue
                episode = Episode.model_validate_json(line)
                for frame, later in episode.later_instructions.items():
                    changes.extend((len(starts), frame, number.setdefault(later, len(number))))
                starts.append(episode.start)
                lengths.append(episode.length)
                text.append(number.setdefault(episode.instruction, len(number)))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {REPAIR}") from None
    except ValidationError as e:
        raise DataError(f"{path}: not an episode table: {e}") from e
    return EpisodeColumns(
        path,
        np.array(starts, np.int64),
        np.array(lengths, np.int64),
        list(number),
        np.array(text, np.int32),
        np.array(changes, np.int64).reshape(-1, 3),
    )


def kept_columns(cache: Path, path: Path, count: int, read: Callable[[], EpisodeColumns]) -> EpisodeColumns:
    """The result of `read` for the first `count` episodes of a table; for a large table it is stored in `cache`.

    The table is read again if its size or time has changed.
    """
    try:
        table = path.stat()
    except FileNotFoundError:
        return read()
    if table.st_size < _LARGE:
        return read()
    of = [str(path), count, table.st_size, table.st_mtime_ns]
    kept = cache / "episodes" / hashlib.sha256(f"{path}\0{count}".encode()).hexdigest()[:16]
    try:
        file = ColumnFile(os.open(kept, os.O_RDONLY | os.O_CLOEXEC))
        if file.head["of"] == of:
            return EpisodeColumns.unpacked(file.head["table"], file, 0)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, struct.error) as e:
        _log.warning("%s: not readable, so it is made anew: %s", kept, e)
    columns = read()
    head, arrays = columns.packed(0)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch = kept.with_name(f".{kept.name}.{os.getpid()}")
        with scratch.open("wb") as f:
            write(f.fileno(), {"of": of, "table": head}, arrays)
            os.fsync(f.fileno())
        scratch.replace(kept)
    except OSError as e:
        _log.warning("%s: cannot be written, so %s is read whole at the next start too: %s", kept, path, e.strerror)
    return columns
