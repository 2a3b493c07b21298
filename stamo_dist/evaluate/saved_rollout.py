"""One rollout of a policy's saved weights, as the recipe's `evaluate.rollout` asks for it."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from stamo_dist.errors import RunError
from stamo_dist.evaluate import curve
from stamo_dist.evaluate.options import RolloutOptions
from stamo_dist.evaluate.rollout import PolicyRollout
from stamo_dist.evaluate.saved_policy import SCRATCH
from stamo_dist.evaluate.simulators import SimulatorCatalogue
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import open_run


def roll_out(run_path: Path, step: int, benchmarks: SimulatorCatalogue, console: Console | None = None) -> None:
    """Roll the checkpoint of `step` out into RUN/eval/during/, and make the table of all steps anew.

    Raises:
        RunError: The run's recipe asks for no rollouts.
        StamoError: What `PolicyRollout` raises.
    """
    run = open_run(run_path)
    recipe = load(run.resolved).recipe
    wanted = recipe.evaluate.rollout
    if wanted is None:
        raise RunError(f"{run.path}: evaluate.rollout is not set in its recipe; `stamo eval rollout` asks for nothing")
    out = curve.folder(run, step)
    for leftover in out.glob(f"{SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    same = {field.name for field in fields(RolloutOptions)} & type(wanted).model_fields.keys() - {"device"}
    PolicyRollout(
        str(run.path),
        checkpoint=str(step),
        benchmarks=benchmarks,
        out=out,
        device=wanted.device or ("cpu" if wanted.where == "process" else None),
        **{name: getattr(wanted, name) for name in same},
    ).evaluate(console)
    curve.write(run, recipe)
