"""A training that would fail at its end fails in its first minutes: its model is exported once, and thrown away."""

from __future__ import annotations

import shutil
import time
import traceback
from pathlib import Path

import torch

from stamo_dist.checkpoint.retention import folder_of
from stamo_dist.data.mixture import Mixture
from stamo_dist.errors import StamoError
from stamo_dist.export import write_model
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder

#: The step of a new run after which it is done: by then a step takes as long as it will.
STEP = 3
_LONG = 3600.0


def wanted(recipe: Recipe, step_seconds: float) -> bool:
    """As `train.dry_export` says; when it is null, in runs that will take longer than an hour."""
    asked = recipe.train.dry_export
    return step_seconds * recipe.train.steps > _LONG if asked is None else asked


def rehearse(recipe: Recipe, mixture: Mixture, run: RunFolder, step: int) -> tuple[str | None, list[str]]:
    """Export the checkpoint of `step` and remove what was written; one process calls it.

    Returns what goes wrong, None where nothing does, and what a person should know.
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
    # All that are kept, and the one that is written before the oldest is removed.
    more = recipe.train.checkpoint.keep * saved + model
    if (free := shutil.disk_usage(run.path).free) < more:
        notes.append(
            f"WARNING: {run.path}: {free / 1e9:,.1f} GB are free, and {recipe.train.checkpoint.keep} more checkpoints "
            f"and the model take {more / 1e9:,.1f} GB; make room, or lower train.checkpoint.keep"
        )
    return None, notes


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
