"""The episode table of a split as columns: what training needs of 10⁶ episodes, in 16 MB."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from stamo_dist.data.schema import EPISODES, Episode
from stamo_dist.errors import DataError


@dataclass(frozen=True)
class EpisodeColumns:
    """Of N episodes, in stored order.

    Attributes:
        path: Of the table.
        starts, lengths: int64 (N,): first sample within the split, frames.
        texts: The distinct instructions, as stored.
        text: int32 (N,), index into `texts` of each one's first frame.
        changes: int64 (C, 3): an episode, its frame from which on the instruction is another, index into `texts`.
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
        """Of each stretch with one instruction, ascending: first sample, episode, index into `texts`; int64 (S,)."""
        episode, frame, text = self.changes.T
        inside = frame < self.lengths[episode]
        own = np.arange(len(self))
        begins = np.concatenate([self.starts, (self.starts[episode] + frame)[inside]])
        order = np.argsort(begins, kind="stable")
        order = (
            order[np.append(np.diff(begins[order]) > 0, True)] if len(order) else order
        )  # a change at frame 0 counts
        return (
            begins[order], np.concatenate([own, episode[inside]])[order],
            np.concatenate([self.text, text[inside]])[order],
        )  # fmt: skip

    def ids(self, episodes: Sequence[int]) -> list[str]:
        """Names of some, read from the table."""
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
        raise DataError(f"{path}: missing; run `stamo data convert` again") from None
    except ValidationError as e:
        raise DataError(f"{path}: not an episode table: {e}") from e
    return EpisodeColumns(
        path, np.array(starts, np.int64), np.array(lengths, np.int64), list(number), np.array(text, np.int32),
        np.array(changes, np.int64).reshape(-1, 3),
    )  # fmt: skip
