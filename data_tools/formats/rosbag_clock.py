"""Pairing each frame of the clock camera with the latest earlier message of every other topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stamo_dist.errors import DataError

#: Default maximum age of a message, in periods of its topic or of the clock, whichever is longer.
PERIODS = 2.0


@dataclass(frozen=True)
class Paired:
    """T frames, and the message of each topic paired with them.

    Attributes:
        times: int64 (T,), ns.
        rows: By topic (T,): number of the message within its topic; the clock's own too.
        early: Frames dropped at the beginning, before every topic had a message.
        late: Frames dropped at the end, after a topic's last message became too old.
    """

    times: np.ndarray
    rows: dict[str, np.ndarray]
    early: int
    late: int


def latest(times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """For each of `at` (T,), the index of the last of `times` (N,) at or before it; -1 if there is none."""
    return np.searchsorted(times, at, side="right") - 1


def pair(times: Mapping[str, np.ndarray], clock: str, max_age: float | None = None) -> Paired:
    """Pair each of the clock's frames with the latest message, at or before it, of every other topic.

    Args:
        times: By topic: int64 (N,), ns, not decreasing.
        clock: The topic whose messages are the frames.
        max_age: Maximum age (s) of a message; by `PERIODS` when omitted.

    Raises:
        DataError: No frame is left, or a message between the first and last frame is too old; says which and how old.
    """
    frames = times[clock]
    rows = {topic: latest(values, frames) for topic, values in times.items()}
    rows[clock] = np.arange(len(frames))
    spoken = np.all([row >= 0 for row in rows.values()], axis=0)
    if not spoken.any():
        silent = [topic for topic, row in rows.items() if (row < 0).all()]
        raise DataError(f"no frame of {clock} comes after the first message of {', '.join(silent) or 'all topics'}")
    first = int(np.argmax(spoken))
    old = {topic: _too_old(times, topic, clock, row, max_age) for topic, row in rows.items() if topic != clock}
    fresh = ~np.any([*old.values(), np.zeros(len(frames), bool)], axis=0)
    fresh[:first] = False
    if not fresh.any():
        raise DataError(_stale(times, clock, rows, old, first))
    end = len(frames) - int(np.argmax(fresh[::-1]))
    if not fresh[first:end].all():
        raise DataError(_stale(times, clock, rows, old, first + int(np.argmin(fresh[first:end]))))
    kept = slice(first, end)
    return Paired(frames[kept], {topic: row[kept] for topic, row in rows.items()}, first, len(frames) - end)


def period(times: Sequence[int] | np.ndarray) -> float:
    """Median seconds between messages; 0 if there is only one."""
    return float(np.median(np.diff(times))) / 1e9 if len(times) > 1 else 0.0


def _limit(times: Mapping[str, np.ndarray], topic: str, clock: str, max_age: float | None) -> float:
    """Maximum age (s) of a topic's messages; infinite for a topic with one message, unless given."""
    if max_age is not None:
        return max_age
    own = period(times[topic])
    return PERIODS * max(own, period(times[clock])) if own else float("inf")


def _too_old(
    times: Mapping[str, np.ndarray], topic: str, clock: str, row: np.ndarray, max_age: float | None
) -> np.ndarray:
    """bool (T,): whether the topic's latest message is too old."""
    age = (times[clock] - times[topic][np.maximum(row, 0)]) / 1e9
    return (row >= 0) & (age > _limit(times, topic, clock, max_age))


def _stale(
    times: Mapping[str, np.ndarray], clock: str, rows: dict[str, np.ndarray], old: dict[str, np.ndarray], at: int
) -> str:
    """The error message about frame `at`, at which a message is too old."""
    topic = next(topic for topic, values in old.items() if values[at])
    age = (times[clock][at] - times[topic][rows[topic][at]]) / 1e9
    frames = int(old[topic].sum())
    seconds = (times[clock][at] - times[clock][0]) / 1e9
    return (
        f"{topic}: at {seconds:.2f} s its latest message is {age:.3g} s old ({frames} frames have such); if it "
        "only speaks when something changes, allow it with --set max_age=SECONDS"
    )
