"""Selecting the frames of an episode to keep, by their timestamps."""

from __future__ import annotations

from statistics import median

import numpy as np

from stamo_dist.errors import DataError

#: Factor by which a target rate may exceed the nominal one: 29.97 Hz counts as 30 Hz.
TOLERANCE = 1.05
#: Two frames whose distances differ by less (s) count as equally near; the earlier one is taken.
TIE = 1e-6


def check_rate(rate_hz: float | None, source_hz: float) -> None:
    """Raises:
    DataError: The target rate is not positive, or above the source's.
    """
    if rate_hz is None:
        return
    if not rate_hz > 0:
        raise DataError(f"rate: {rate_hz} must be positive")
    if rate_hz > source_hz * TOLERANCE:
        raise DataError(
            f"rate: {rate_hz:g} Hz is above the {source_hz:g} Hz of this source, and frames are never invented; "
            f"give --rate {source_hz:g} or less, or leave it out to keep every frame"
        )


def resample(times: np.ndarray, rate_hz: float | None) -> np.ndarray:
    """Indices of the frames nearest to t0, t0 + 1 / rate, …; all of them without a rate.

    Works for any spacing of the frames. Where frames are sparser than the rate, each is taken once.

    Args:
        times: (T,), seconds, increasing.
        rate_hz: Target rate.

    Returns:
        Increasing int64 indices; the first is 0.
    """
    if rate_hz is None or len(times) < 2:
        return np.arange(len(times))
    count = int((times[-1] - times[0]) * rate_hz + TIE) + 1
    grid = times[0] + np.arange(count) / rate_hz
    right = np.searchsorted(times, grid).clip(1, len(times) - 1)
    left = right - 1
    return np.unique(np.where(grid - times[left] <= times[right] - grid + TIE, left, right))


def durations(times: np.ndarray) -> np.ndarray:
    """Seconds from each frame to the next, (T,); the last value is the median of the others, a single frame's is 0."""
    steps = np.diff(times)
    return np.append(steps, median(steps.tolist()) if len(steps) else 0.0)


def close_up(seconds: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Times of the kept steps with the durations of dropped steps removed.

    Args:
        seconds: (T,) from each frame to the next.
        keep: bool (T,).
    """
    kept = seconds[keep]
    return np.cumsum(kept) - kept
