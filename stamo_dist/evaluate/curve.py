"""A policy's success over its training: `RUN/eval/during/` for the report, `success.json` for other commands.

Rewritten from the existing results whenever a rollout ends, by the training or by the rollout itself.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

from stamo_dist.checkpoint.retention import folder_of
from stamo_dist.evaluate import successes
from stamo_dist.evaluate.result import EvaluationResult, Figure, Provenance
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.success import KEY, Success, Successes, best_of

NAME = "during"
ALL = "all tasks"
_COLUMNS = {"step": "step", "suite": "suite", "task": "task", **successes.COLUMNS}
_ABOUT = (
    "Closed loop, on weights that were saved while it trained (`evaluate.rollout` in the recipe); videos are of the "
    "newest. "
)


def folder(run: RunFolder, step: int) -> Path:
    """The folder of one rollout."""
    return run.evaluations / NAME / f"step_{step:08d}"


def steps(run: RunFolder) -> list[int]:
    """The steps with a rollout folder, ascending."""
    names = (path.name.removeprefix("step_") for path in (run.evaluations / NAME).glob("step_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def result(run: RunFolder, step: int) -> dict[str, Any] | None:
    """rollout.json of a step, None if it does not exist."""
    try:
        found: dict[str, Any] = json.loads((folder(run, step) / "rollout.json").read_text())
    except (OSError, ValueError):
        return None
    return found


def overall(step: int, found: dict[str, Any]) -> Success:
    """The success rate over the trials of all tasks."""
    rows = [row for row in found["rows"] if row["task"] != ALL]
    trials = sum(row["trials"] for row in rows)
    good = sum(round(row["trials"] * row["success"] / 100) for row in rows if row["trials"])
    low, high = successes.interval(good, trials)
    return Success(step, 100 * good / trials, low, high, trials)


def numbers(step: int, found: dict[str, Any]) -> tuple[Success, dict[str, float]]:
    """The values of a rollout for metrics.jsonl and W&B: overall, and for each task."""
    success = overall(step, found)
    numbers: dict[str, float] = {f"{KEY}/{k}": getattr(success, k) for k in ("success", "low", "high", "trials")}
    rows = [row for row in found["rows"] if row["task"] != ALL]
    suites = {row["suite"] for row in rows}
    for row in rows:
        task = row["task"] if len(suites) == 1 else f"{row['suite']}/{row['task']}"
        numbers |= {f"{KEY}/{task}/{name}": row[name] for name in ("success", "low", "high")}
    return success, numbers


def write(run: RunFolder, recipe: Recipe) -> None:
    """Write the table of all steps and success.json; the best is chosen among steps whose checkpoint still exists."""
    found = {step: there for step in steps(run) if (there := result(run, step)) is not None}
    if not found:
        run.success.unlink(missing_ok=True)
        (run.evaluations / NAME / f"{NAME}.json").unlink(missing_ok=True)
        return
    newest = max(found)
    alike = [
        overall(step, there)
        for step, there in found.items()
        if there["settings"] == found[newest]["settings"] and folder_of(run.checkpoints, step).is_dir()
    ]
    best = best_of(alike)
    Successes(overall(newest, found[newest]), best).write(run.path)
    for step in found.keys() - {newest, best and best.step}:  # otherwise they accumulate over a long training
        for video in folder(run, step).rglob("*.gif"):
            video.unlink(missing_ok=True)
    rows = [{"step": step, **row} for step, there in found.items() for row in there["rows"]]
    place = folder(run, newest).name
    figures = [Figure(**{**figure, "file": f"{place}/{figure['file']}"}) for figure in found[newest]["figures"]]
    provenance, settings = Provenance(**found[newest]["provenance"]), found[newest]["settings"]
    title, about = "Success while it trained", _ABOUT + successes.INTERVAL
    EvaluationResult(NAME, title, about, _COLUMNS, rows, settings, provenance, figures=figures).write(
        run.evaluations / NAME
    )


def reason(log: Path) -> str:
    """Why a rollout ended without a result, from its log."""
    try:
        with log.open(errors="replace") as f:
            lines = [line.rstrip() for line in deque(f, 200) if line.strip()]
    except OSError:
        lines = []
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or lines or ["it ended and said nothing"])[-1]
