"""Spikes of loss and gradient norm: said, and left to the user to act on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from stamo_dist.run.history import last_objects
from stamo_dist.run.success import is_late

_WATCHED = {"loss": "the loss", "grad_norm": "the gradient norm"}
_FEWEST = 30  # logged steps before anything is a spike
_LEAST = 1e-30
_SMALLEST = 0.01  # deviation: what moves by less than a tenth is no spike
_MAD = 1.4826  # of a normal distribution, deviation ÷ median absolute deviation


class SpikeAlarms:
    """Compares each logged step with the `window` before it by a robust z-score: (x − median) ÷ (1.4826 · MAD).

    Both are compared by their logarithms: over batches they vary by factors. A spike of several steps raises one alarm.

    Args:
        window: Logged steps.
        deviations: The z-score of an alarm.
        before: Lines of metrics.jsonl of earlier steps, oldest first.
    """

    def __init__(self, window: int, deviations: float, before: Iterable[Mapping[str, Any]] = ()):
        self._deviations = deviations
        self._seen = {name: deque[float](maxlen=window) for name in _WATCHED}
        self._high = dict.fromkeys(_WATCHED, False)
        for line in before:
            self.look(line)

    def look(self, line: Mapping[str, Any]) -> dict[str, float]:
        """Take in the next step; returns the z-score of each name that begins to spike."""
        found = {}
        for name, seen in self._seen.items():
            value = line.get(name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            value = math.log(max(value, _LEAST))
            z = _robust_z(value, seen) if len(seen) >= min(_FEWEST, seen.maxlen or _FEWEST) else 0.0
            if z >= self._deviations and not self._high[name]:
                found[name] = round(z, 1)
            self._high[name] = z >= self._deviations
            seen.append(value)
        return found


def alarm_text(line: Mapping[str, Any]) -> str:
    """The alarms in a line of metrics.jsonl, as the log and `stamo status` say them."""
    said = (
        f"{_WATCHED[name]} is {line[name]:.4g}, {z:g} deviations above the steps before"
        for name, z in line["alarms"].items()
    )
    return f"step {line['step']}: {'; '.join(said)}"


def steps_before(metrics: Path, window: int) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl, oldest first."""
    return list(islice(last_objects(metrics, lambda line: not is_late(line)), window))[::-1]


def _robust_z(value: float, seen: Iterable[float]) -> float:
    seen = list(seen)
    middle = median(seen)
    deviation = _MAD * median(abs(x - middle) for x in seen)
    return (value - middle) / max(deviation, _SMALLEST)
