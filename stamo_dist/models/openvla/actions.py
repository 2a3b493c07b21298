"""Actions as tokens, and the statistics that map them to [-1, 1] and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stamo_dist.errors import CheckpointError, DataError
from stamo_dist.recipe.policy import Bounds

STATISTICS = "dataset_statistics.json"
SETTINGS = "policy.json"
_ENDS = {"q99": ("q01", "q99"), "minmax": ("min", "max")}
_EPSILON = 1e-8  # of the official normalisation, avoids division by zero
_NOISE = 1e-5  # tolerances (relative, absolute) for a constant dimension


class ActionTokenizer:
    """Numbers in [low, high] ↔ the last ids of a vocabulary, by uniform bins.

    `bins` is the number of bin edges, so there are bins − 1 centres; id = vocabulary − number of the bin, and only the
    exact upper end has the lowest id, vocabulary − bins. Edges are float64, so a float32 action at an edge may fall
    into the neighbouring bin.
    """

    def __init__(self, vocabulary: int = 32000, bins: int = 256, low: float = -1.0, high: float = 1.0):
        self.vocabulary = vocabulary
        self.edges = np.linspace(low, high, bins)
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2

    @property
    def begin(self) -> int:
        """All action ids are above this one."""
        return self.vocabulary - len(self.edges) - 1

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions of any shape → int64 ids of the same shape; values outside are clipped.

        Raises:
            DataError: an action is NaN.
        """
        if np.isnan(actions).any():
            raise DataError("an action is NaN; `stamo data check` names the sample")
        clipped = np.clip(actions, self.edges[0], self.edges[-1])
        return self.vocabulary - np.digitize(clipped, self.edges)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Ids of any shape → float64 centres; the two lowest action ids, and ids outside, give the nearest centre."""
        return self.centres[np.clip(self.vocabulary - np.asarray(ids) - 1, 0, len(self.centres) - 1)]


@dataclass(frozen=True)
class ValueRange:
    """The value range of one vector, for normalisation.

    Dimensions outside `mask` (a gripper) are unchanged, except constant ones: they are 0 when normalised and restored
    to their constant. The official code restores them to 0, which may be a command.
    """

    low: np.ndarray  # (A,)
    high: np.ndarray  # (A,)
    mask: np.ndarray  # (A,) bool
    constant: np.ndarray  # (A,) bool: min is max, and so are low and high

    @classmethod
    def from_statistics(cls, statistics: Mapping[str, Any], bounds: Bounds, source: str) -> ValueRange:
        """`statistics` is what the released files hold of `action` or `proprio`: q01, q99, min, max and maybe mask.

        Raises:
            DataError: a field is missing or they differ in length; `source` says where.
        """
        names = _ENDS[bounds]
        if missing := [name for name in names if name not in statistics]:
            raise DataError(f"{source}: {', '.join(missing)} is missing; compute it with `stamo data stats`")
        low, high = (np.asarray(statistics[name], np.float64) for name in names)
        mask = np.asarray(statistics.get("mask", np.ones(low.shape)), bool)
        extremes = [np.asarray(statistics.get(k, v), np.float64) for k, v in (("min", low), ("max", high))]
        if not all(np.isfinite(ends).all() for ends in (low, high, *extremes)):
            raise DataError(f"{source}: some of its numbers are none; compute it anew with `stamo data stats`")
        if not low.shape == high.shape == mask.shape == extremes[0].shape == extremes[1].shape:
            raise DataError(f"{source}: its fields have different lengths; compute them anew with `stamo data stats`")
        # Quantiles alone do not distinguish a constant gripper from one that rarely moves.
        known = mask | ("min" in statistics and "max" in statistics)
        constant = (extremes[0] == extremes[1]) & known
        return cls(np.where(constant, extremes[0], low), np.where(constant, extremes[0], high), mask, constant)

    def __len__(self) -> int:
        return len(self.low)

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """(…, A) → (…, A) as in the official training: masked dimensions to [-1, 1], clipped; constant ones to 0.

        Raises:
            DataError: the last dimension has another size.
        """
        self._check(values)
        scaled = np.clip(2 * (values - self.low) / (self.high - self.low + _EPSILON) - 1, -1, 1)
        return np.where(self.constant, 0.0, np.where(self.mask, scaled, values))

    def normalise_proprio(self, values: np.ndarray) -> np.ndarray:
        """(…, A) → (…, A) as OFT's inference treats proprioception: a constant dimension is -1.

        Sensor noise around a constant is not a signal: scaled by a range of zero it would jump between both ends.
        """
        self._check(values)
        noise = self.constant & np.isclose(values, self.low, rtol=_NOISE, atol=_NOISE)
        values = np.where(noise, self.low, values)
        scaled = np.clip(2 * (values - self.low) / (self.high - self.low + _EPSILON) - 1, -1, 1)
        return np.where(self.mask, scaled, values)

    def restore(self, values: np.ndarray, epsilon: bool) -> np.ndarray:
        """Normalised (…, A) → the source's units; OFT adds an `epsilon` to the range, OpenVLA does not.

        Dimensions that are constant in the data are restored to that constant, whatever is predicted.
        """
        self._check(values)
        width = self.high - self.low + (_EPSILON if epsilon else 0.0)
        moving = np.where(self.mask, 0.5 * (values + 1) * width + self.low, values)
        return np.where(self.constant, self.low, moving)

    def _check(self, values: np.ndarray) -> None:
        if np.shape(values)[-1:] != self.low.shape:
            raise DataError(f"{np.shape(values)[-1:]} values, but the statistics are of {len(self.low)} dimensions")


@dataclass(frozen=True)
class SeenAs:
    """How a policy saw the frames of a source in its training."""

    format: str  # of the dataset, which is also the name of the simulator where it is simulated
    cameras: tuple[str, ...]  # of one timestep, in the order of the policy's views
    size: int  # side of the frames
    frame_size: tuple[int, int] | None = None  # (H, W) before resizing, if known


class Statistics:
    """Statistics of every source a policy was trained on, by its name.

    `seen`: how the policy saw their frames; empty if not recorded, as for released weights.
    """

    def __init__(self, sources: Mapping[str, Mapping[str, Any]], origin: str, seen: Mapping[str, SeenAs] | None = None):
        self.sources, self.origin, self.seen = dict(sources), origin, dict(seen or {})

    @classmethod
    def read(cls, folder: Path, inside: Mapping[str, Any]) -> Statistics:
        """Read `dataset_statistics.json` of a checkpoint folder, or else `inside`, the statistics of its config.json.

        Raises:
            CheckpointError: the file is not a JSON map.
        """
        path = folder / STATISTICS
        seen = seen_as(folder)
        if not path.is_file():
            return cls(inside, str(folder / "config.json"), seen)
        try:
            sources = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from error
        if not isinstance(sources, dict):
            raise CheckpointError(f"{path}: is not a map from a source's name to its statistics; copy it again")
        if wrong := [name for name, found in sources.items() if not isinstance(found, dict)]:
            raise CheckpointError(f"{path}: {wrong[0]} is not a map from a column to its statistics; copy it again")
        return cls(sources, str(path), seen)

    def key(self, name: str | None, suffixes: Sequence[str] = ("", "_no_noops")) -> str:
        """The source called `name`, or `name` with a suffix that the released LIBERO policies have.

        Raises:
            DataError: there is no such source, or none is named and there are several.
        """
        known = ", ".join(self.sources) or "none"
        if name is None:
            if len(self.sources) == 1:
                return next(iter(self.sources))
            raise DataError(f"{self.origin} has statistics of {known}: name one of them (unnorm_key, --unnorm-key)")
        for candidate in (name + suffix for suffix in suffixes):
            if candidate in self.sources:
                return candidate
        raise DataError(f"{self.origin} has no statistics of {name!r}; it has those of {known} (unnorm_key)")

    def range(self, name: str | None, column: Literal["action", "proprio"], bounds: Bounds = "q99") -> ValueRange:
        """The range of one column of a source.

        Raises:
            DataError: there is no such source or column, or a field is missing.
        """
        key = self.key(name)
        source = f"{self.origin}: {key}.{column}"
        statistics = self.sources[key].get(column)
        if statistics is None:
            raise DataError(f"{source} is missing; compute it with `stamo data stats`")
        return ValueRange.from_statistics(statistics, bounds, source)


def seen_as(folder: Path) -> dict[str, SeenAs]:
    """Source → how the policy saw its frames, read from its settings without opening weights."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["sources"]
        return {
            name: SeenAs(
                s["format"], tuple(s["cameras"]), s["size"], tuple(s["frame_size"]) if s["frame_size"] else None
            )
            for name, s in found.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # of another program, or written before these were recorded
