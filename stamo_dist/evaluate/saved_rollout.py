"""One rollout of a policy's saved weights, as the recipe's `evaluate.rollout` asks for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from stamo_dist.errors import RunError
from stamo_dist.evaluate import curve
from stamo_dist.evaluate.rollout import rollout
from stamo_dist.evaluate.saved_policy import SCRATCH
from stamo_dist.evaluate.simulators import Benchmarks
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import open_run


def roll_out(run_path: Path, step: int, benchmarks: Benchmarks, console: Console | None = None) -> None:
    """Roll the checkpoint of `step` out into RUN/eval/during/, and make the table of all steps anew.

    Raises:
        RunError: The run's recipe asks for no rollouts.
        StamoError: What `rollout` raises.
    """
    run = open_run(run_path)
    recipe = load(run.resolved).recipe
    wanted = recipe.evaluate.rollout
    if wanted is None:
        raise RunError(f"{run.path}: evaluate.rollout is not set in its recipe; `stamo eval rollout` asks for nothing")
    out = curve.folder(run, step)
    for leftover in out.glob(f"{SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    options: dict[str, Any] = {} if wanted.size is None else {"size": wanted.size}
    rollout(
        str(run.path), benchmarks, checkpoint=str(step), tasks=wanted.tasks, benchmark=wanted.benchmark,
        trials=wanted.trials, cameras=wanted.cameras, actions=wanted.actions, unnorm_key=wanted.unnorm_key,
        act_steps=wanted.act_steps, max_steps=wanted.max_steps, processes=wanted.processes, videos=wanted.videos,
        device=wanted.device or ("cpu" if wanted.where == "process" else None), out=out, console=console, **options,
    )  # fmt: skip
    curve.write(run, recipe)
