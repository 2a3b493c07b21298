"""Frames are kept by their time stamps, whatever the spacing."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.convert.timing import check_rate, close_up, durations, resample
from stamo_dist.errors import DataError


def test_every_second_frame_of_twice_the_rate() -> None:
    np.testing.assert_array_equal(resample(5 + np.arange(9) / 20, 10), [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(resample(np.arange(9) / 20, None), np.arange(9))


def test_no_drift_over_an_hour_of_a_rate_that_does_not_divide() -> None:
    times = np.arange(3600 * 30) / 29.97
    kept = resample(times, 10)
    assert len(kept) == int(times[-1] * 10) + 1
    assert np.abs(times[kept] - np.arange(len(kept)) / 10).max() <= 0.5 / 29.97 + 1e-6


def test_variable_rate_takes_the_nearest_in_time_and_never_a_frame_twice() -> None:
    times = np.array([0, 0.01, 0.1, 0.19, 0.21, 0.9, 1.0])
    np.testing.assert_array_equal(resample(times, 10), [0, 2, 3, 4, 5, 6])


def test_equally_near_frames_do_not_depend_on_rounding() -> None:
    """30 Hz at 20: every other target lies in the middle of two frames."""
    for start in (0.0, 1e6 / 3, 0.1):
        np.testing.assert_array_equal(resample(start + np.arange(10) / 30, 20), [0, 1, 3, 4, 6, 7, 9])


def test_a_rate_above_the_source_is_refused_and_both_are_named() -> None:
    check_rate(30, 29.97)
    with pytest.raises(DataError, match=r"20 Hz is above the 10 Hz"):
        check_rate(20, 10)
    with pytest.raises(DataError, match="must be positive"):
        check_rate(0, 10)


def test_dropped_steps_take_no_time() -> None:
    times = np.array([0, 0.1, 0.3, 0.4, 0.5])
    keep = np.array([True, False, True, True, False])
    np.testing.assert_allclose(close_up(durations(times), keep), [0, 0.1, 0.2])
