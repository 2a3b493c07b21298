"""Checking before training that a recipe's rollouts are possible. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from stamo_dist.errors import DataError, RecipeError

if TYPE_CHECKING:
    from stamo_dist.evaluate.simulators import SimulatorCatalogue
    from stamo_dist.recipe.schema import Recipe


def check_rollout(recipe: Recipe, benchmarks: SimulatorCatalogue) -> None:
    """Raise now what a recipe's rollouts would raise later, if the simulator is installed here.

    Raises:
        RecipeError: Unknown benchmark, task or camera, or more trials than there are initial states.
    """
    from stamo_dist.evaluate.simulators import Setting

    wanted = recipe.evaluate.rollout
    benchmark = (wanted.benchmark or _format(recipe)) if wanted is not None else None
    if wanted is None or benchmark is None or not benchmarks.checkable(benchmark):
        return
    try:
        cameras = tuple(wanted.cameras) or (benchmarks.default_camera(benchmark),)
        benchmarks.resolve(benchmark, wanted.tasks, Setting(wanted.size or 256, cameras, wanted.actions))
    except DataError as e:
        joints = (("." if re.match("(cameras|tasks|size): ", line) else ": ", line) for line in str(e).splitlines())
        raise RecipeError([f"evaluate.rollout{joint}{line}" for joint, line in joints]) from None
    most = benchmarks.trials(benchmark)
    if most is not None and wanted.trials > most:
        raise RecipeError([f"evaluate.rollout.trials: {benchmark} has {most} initial states of each task"])


def _format(recipe: Recipe) -> str | None:
    """The source format of the data with actions, if unique and available: the default benchmark of rollouts."""
    from stamo_dist.data.schema import read_manifest

    found = set()
    for source in recipe.data.used.values():
        if source.actions:
            try:
                found.add(read_manifest(Path(source.paths[0]).expanduser()).source_format)
            except DataError:
                return None
    return found.pop() if len(found) == 1 else None
