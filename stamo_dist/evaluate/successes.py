"""Success rates of trials: table rows, missing trials, and videos for the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from stamo_dist.errors import RunError
from stamo_dist.evaluate.closed_loop import TaskTrial, TrialFolder, TrialOutcome
from stamo_dist.evaluate.figures import file_name
from stamo_dist.evaluate.result import Figure

INTERVAL = "low and high bound the success rate with 95 % (Wilson's interval)."


def interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate, in %."""
    z, p = 1.96, successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def row(outcomes: Sequence[TrialOutcome]) -> dict[str, Any]:
    """Trials, success in %, its interval, and the mean steps of the trials that succeeded."""
    good = [o for o in outcomes if o.success]
    low, high = interval(len(good), len(outcomes)) if outcomes else (None, None)
    return {
        "trials": len(outcomes),
        "success": 100 * len(good) / len(outcomes) if outcomes else None,
        "low": low,
        "high": high,
        "steps": fmean(o.steps for o in good) if good else None,
    }


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[float, float, float]:
    """Difference of two rows' success rates in points, and its 95 % interval: Newcombe's (1998, method 10)."""
    p, q = first["success"], second["success"]
    down, up = math.hypot(p - first["low"], second["high"] - q), math.hypot(first["high"] - p, q - second["low"])
    return p - q, p - q - down, p - q + up


COLUMNS = {"trials": "trials", "success": "success %", "low": "low", "high": "high", "steps": "steps"}


def my_share(trials: Sequence[TaskTrial], slice: int, num_slices: int) -> list[TaskTrial]:
    """This slice's share of the trials.

    Raises:
        RunError: There is no such slice.
    """
    if not 0 <= slice < num_slices:
        raise RunError(f"--slice {slice}: must be between 0 and --num-slices − 1 ({num_slices - 1})")
    return list(trials[slice::num_slices])


class Films:
    """Decides which outcomes keep a video: up to `most` of each task's successes and of its failures.

    Videos of `trials` kept earlier are counted too.
    """

    def __init__(self, store: TrialFolder, trials: Sequence[TaskTrial], most: int):
        there = [o for o in store.read(trials).values() if store.video(o) is not None]
        self._kept, self._most = Counter((o.task, o.success) for o in there), most

    def __call__(self, outcome: TrialOutcome) -> bool:
        key = (outcome.task, outcome.success)
        self._kept[key] += 1
        return self._kept[key] <= self._most


SIDES = {True: "succeeded", False: "failed"}


def side_by_side(
    found: Sequence[TrialOutcome], trials: TrialFolder, folder: Path, label: str, most: int
) -> list[Figure]:
    """As `videos`, for one task: up to `most` of its successes and as many of its failures, side by side."""
    figures = []
    for success, side in SIDES.items():
        chosen = [o for o in found if o.success == success]
        task = f"{found[0].task}: {len(chosen) if success else len(found) - len(chosen)} of {len(found)} succeeded"
        shown = videos(chosen, trials, folder, label, most)
        figures += [replace(figure, task=task, side=side) for figure in shown]
    return figures


def videos(found: Sequence[TrialOutcome], trials: TrialFolder, folder: Path, label: str, most: int) -> list[Figure]:
    """Copies of up to `most` videos into the result's folder."""
    figures: list[Figure] = []
    for outcome in found:
        video = trials.video(outcome)
        if video is None or len(figures) == most:
            continue
        how = f"succeeded after {outcome.steps} steps" if outcome.success else f"failed in {outcome.steps} steps"
        file = file_name(f"{label}_{outcome.task.rsplit('/', 1)[-1][:60]}_{outcome.trial}", "gif")
        (folder / file).write_bytes(video.read_bytes())
        figures.append(Figure(file, f"{label}, {outcome.task}, trial {outcome.trial}: {how}"))
    return figures
