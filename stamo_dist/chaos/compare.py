"""Comparing the output of a run with undisturbed runs of the same recipe."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from stamo_dist.errors import RunError
from stamo_dist.tracking.system import SYSTEM

#: Logged values that measure time, or that differ on purpose.
_TIMES = {
    "step",
    "samples_per_second",
    "data_wait",
    "comm_wait",
    "peak_gb",
    "reserved_gb",
    "changed",
    "alarms",
    "seconds",
    "mfu",
    "step_seconds_max",
    "step_seconds_min",
    "slowest_rank",
    "save_seconds",
    "save_stall",
    "save_failed",
}


def _is_result(name: str) -> bool:
    return name not in _TIMES and not name.startswith(SYSTEM)


IDENTICAL, WITHIN, NOT, UNFINISHED = "identical", "within spread", "NOT", "not finished"


@dataclass(frozen=True)
class History:
    """The samples and metrics that a run logged."""

    values: list[tuple[int, dict[str, Any]]]  # (step, logged values)
    samples: list[tuple[int, list[tuple[int, int]]]]  # (step, (sample, checksum of its content) for its global batch)

    @classmethod
    def read(cls, run: Path) -> History:
        """Raises:
        RunError: The run logged no samples.
        """
        values = [(line["step"], {k: v for k, v in line.items() if _is_result(k)}) for line in _lines(run, "metrics")]
        samples = [
            (line["step"], list(zip(line["samples"], line["checksums"], strict=True)))
            for line in _lines(run, "samples")
        ]
        return cls(values, samples)


@dataclass
class Comparison:
    """The comparison of a run with undisturbed ones."""

    lost: int  # samples of an undisturbed run that are missing in this one
    repeated: int  # samples that this run has more often
    other: list[int]  # steps whose global batch differs in samples or in their content
    losses: str  # identical | within spread | NOT
    deviation: float = 0.0  # largest relative difference of a value from the nearest undisturbed run
    spread: float = 0.0  # largest difference between the undisturbed runs
    why: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.lost or self.repeated or self.other or self.losses == NOT)


def compare(run: History, untouched: Sequence[History]) -> Comparison:
    """Samples must equal the undisturbed runs' in every step; values must equal one of them bit for bit.

    If several undisturbed runs differ, the device is not deterministic: then a value may differ from the nearest of
    them by up to the largest difference between them up to that step.
    """
    reference = untouched[0]
    mine, theirs = _count(run), _count(reference)
    verdict = Comparison((theirs - mine).total(), (mine - theirs).total(), _other_steps(run, reference), IDENTICAL)
    if verdict.other:
        verdict.why.append(f"other samples in {_few(verdict.other)}")
    steps = [step for step, _ in run.values]
    if steps != [step for step, _ in reference.values]:
        expected = [step for step, _ in reference.values]
        wrong = sorted((Counter(steps) - Counter(expected) | Counter(expected) - Counter(steps)).elements())
        verdict.losses = NOT
        verdict.why.append(f"not every step is logged once and in order: {_few(wrong or steps)}")
        return verdict
    _compare_values(run, untouched, verdict)
    return verdict


def spread(untouched: Sequence[History]) -> float:
    """The largest relative difference of a value in a step between two of them; all must have logged the same steps."""
    widest: dict[str, float] = {}
    for lines in zip(*(u.values for u in untouched), strict=True):
        _widen(widest, [values for _, values in lines])
    return max(widest.values(), default=0.0)


def _widen(widest: dict[str, float], values: Sequence[dict[str, Any]]) -> None:
    for a, b in combinations(values, 2):
        for key, difference in _differences(a, b).items():
            widest[key] = max(widest.get(key, 0.0), difference)


def _compare_values(run: History, untouched: Sequence[History], verdict: Comparison) -> None:
    widest: dict[str, float] = {}
    beyond: list[int] = []
    for i, (step, values) in enumerate(run.values):
        others = [u.values[i][1] for u in untouched]
        _widen(widest, others)
        verdict.spread = max(verdict.spread, *widest.values(), 0.0)
        if values in others:
            continue
        verdict.losses = WITHIN if verdict.losses == IDENTICAL else verdict.losses
        nearest = min((_differences(values, other) for other in others), key=lambda d: max(d.values(), default=0.0))
        verdict.deviation = max(verdict.deviation, *nearest.values(), 0.0)
        if any(difference > widest.get(key, 0.0) for key, difference in nearest.items()):
            beyond.append(step)
    if beyond:
        verdict.losses = NOT
        verdict.why.append(f"other losses in {_few(beyond)}")


def _differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """Relative difference of each value; infinite if only one has it."""
    return {key: _difference(a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def _difference(a: float | None, b: float | None) -> float:
    return math.inf if a is None or b is None else abs(a - b) / max(abs(a), abs(b))


def _count(history: History) -> Counter[int]:
    return Counter(sample for _, batch in history.samples for sample, _ in batch)


def _other_steps(run: History, reference: History) -> list[int]:
    batches = [{step: sorted(batch) for step, batch in h.samples} for h in (run, reference)]
    twice = [step for step, n in Counter(step for step, _ in run.samples).items() if n > 1]
    steps = batches[0].keys() | batches[1].keys()
    return sorted({*twice, *(s for s in steps if batches[0].get(s) != batches[1].get(s))})


def _lines(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / f"{name}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as e:
        raise RunError(f"{path}: cannot be read ({e.strerror}); the run did not get to its first step") from None
    except ValueError as e:
        raise RunError(f"{path}: a line is torn ({e})") from None


def _few(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:6]))
    return f"steps {shown}{f' and {len(steps) - 6} more' if len(steps) > 6 else ''}"
