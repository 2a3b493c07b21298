"""Statistics of an episode's features, and of all episodes, as LeRobot keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
FeatureStats = dict[str, Any]


def of_rows(values: NDArray[np.generic]) -> FeatureStats:
    """Of the rows (N, D) of a feature: a list of D numbers each."""
    rows = values.astype(np.float64)
    found: FeatureStats = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    found |= dict(zip(QUANTILES, np.quantile(rows, list(QUANTILES.values()), axis=0), strict=True))
    return {**{name: value.tolist() for name, value in found.items()}, "count": [len(rows)]}


class PixelCounts:
    """How often each value occurs in the frames of an episode, per colour: its statistics are exact."""

    def __init__(self) -> None:
        self._counts, self._frames = np.zeros((3, 256), np.int64), 0

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Count a frame (H, W, 3)."""
        for colour in range(3):
            self._counts[colour] += np.bincount(frame[..., colour].ravel(), minlength=256)
        self._frames += 1

    def stats(self) -> FeatureStats:
        """Of colours in [0, 1], in the shape (3, 1, 1)."""
        values, total = np.arange(256) / 255, self._counts.sum(1)
        mean = self._counts @ values / total
        below = self._counts.cumsum(1)
        found = {
            "min": values[(self._counts > 0).argmax(1)],
            "max": values[255 - (self._counts[:, ::-1] > 0).argmax(1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(0, self._counts @ values**2 / total - mean**2)),
            **{name: values[(below >= q * total[:, None]).argmax(1)] for name, q in QUANTILES.items()},
        }
        return {**{name: v.reshape(3, 1, 1).tolist() for name, v in found.items()}, "count": [self._frames]}


def together(episodes: Sequence[FeatureStats]) -> FeatureStats:
    """Of all episodes: quantiles are means of theirs, weighted by frames, as LeRobot's own."""
    counts = np.array([one["count"][0] for one in episodes], np.float64)
    arrays = {name: np.array([one[name] for one in episodes]) for name in episodes[0] if name != "count"}

    def weighted(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.tensordot(counts / counts.sum(), values, 1))

    mean = weighted(arrays["mean"])
    found = {
        "min": arrays["min"].min(0),
        "max": arrays["max"].max(0),
        "mean": mean,
        "std": np.sqrt(weighted(arrays["std"] ** 2 + (arrays["mean"] - mean) ** 2)),
        **{name: weighted(arrays[name]) for name in QUANTILES},
    }
    return {**{name: value.tolist() for name, value in found.items()}, "count": [int(counts.sum())]}
