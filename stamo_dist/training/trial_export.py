"""A trial export early in a run, so that a training whose export would fail at the end fails in its first minutes."""

from __future__ import annotations

import shutil
import time
import traceback
from pathlib import Path

import torch

from stamo_dist.checkpoint.retention import folder_of
from stamo_dist.data.mixture import Mixture
from stamo_dist.distributed.collectives import broadcast
from stamo_dist.distributed.rank import World
from stamo_dist.errors import RunError, StamoError
from stamo_dist.export import write_model
from stamo_dist.faults.watchdog import Watchdog
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder
from stamo_dist.tracking.logger import RunLogger

#: The step of a new run after which it is done, when steps have reached their usual duration.
STEP = 3
_LONG = 3600.0


class TrialExport:
    """Exports the model of a new run once, early; every process makes one."""

    def __init__(
        self, recipe: Recipe, mixture: Mixture, run: RunFolder, world: World, logger: RunLogger, watchdog: Watchdog
    ):
        self._recipe, self._mixture, self._run, self._world = recipe, mixture, run, world
        self._logger, self._watchdog = logger, watchdog
        self._new = False
        self.steps = recipe.train.steps

    def on_start(self, step: int) -> None:
        """The run continues after `step`."""
        self._new = step == 0

    def due(self, step: int, step_seconds: float) -> bool:
        """Whether to export after `step`, given the seconds per step; decided by rank 0."""
        return self._new and step == STEP < self.steps and broadcast(wanted(self._recipe, step_seconds))

    def run(self, step: int) -> None:
        """Export the checkpoint of `step`; the other ranks wait.

        Raises:
            RunError: The model could not be exported.
        """
        self._watchdog.mark("exporting on trial after", step)
        problem, notes = try_export(self._recipe, self._mixture, self._run, step) if self._world.is_main else (None, [])
        for note in notes:
            self._logger.info(f"  {note}")
        if problem := broadcast(problem):
            raise RunError(
                f"train.dry_export: the model could not be exported at the end of this run: {problem}\nmend that and "
                f"start again: it goes on after step {step}"
            )


def wanted(recipe: Recipe, step_seconds: float) -> bool:
    """By `train.dry_export`; if null, in runs that will take longer than an hour."""
    asked = recipe.train.dry_export
    return step_seconds * recipe.train.steps > _LONG if asked is None else asked


def try_export(recipe: Recipe, mixture: Mixture, run: RunFolder, step: int) -> tuple[str | None, list[str]]:
    """Export the checkpoint of `step` and remove what was written; one process calls it.

    Returns the error, None without one, and notes for the user.
    """
    checkpoint, folder, began = folder_of(run.checkpoints, step), run.path / ".model.dry", time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            write_model(recipe, mixture, checkpoint, folder)
        model, saved = _size(folder), _size(checkpoint)
    except (StamoError, OSError) as e:
        return str(e), []
    except Exception:
        return traceback.format_exc(), []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - began
    notes = [f"the model can be exported: {model / 1e6:,.1f} MB, in {seconds:.1f} s (train.dry_export)"]
    # All checkpoints that are kept, plus the one written before the oldest is removed.
    more = recipe.train.checkpoint.keep * saved + model
    if (free := shutil.disk_usage(run.path).free) < more:
        notes.append(
            f"WARNING: {run.path}: {free / 1e9:,.1f} GB are free, and {recipe.train.checkpoint.keep} more checkpoints "
            f"and the model take {more / 1e9:,.1f} GB; make room, or lower train.checkpoint.keep"
        )
    return None, notes


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
