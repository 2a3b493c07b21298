"""From a checkpoint to the usable model."""

from __future__ import annotations

import json
import shutil
from contextlib import closing

from stamo_dist.data.loader import Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.engine import checkpoint
from stamo_dist.engine.runfolder import RunFolder, write_atomic
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks import build_task

_BATCHES = 16


def exported_step(run: RunFolder) -> int | None:
    """The step whose weights `run.model` holds, None where there is no whole export."""
    try:
        return int(json.loads(run.exported.read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def export(recipe: Recipe, mixture: Mixture, run: RunFolder, step: int) -> None:
    """Write `run.model` from the checkpoint of `step`; one process calls it.

    Raises:
        CheckpointError: The checkpoint is not whole.
    """
    weights = checkpoint.read_weights(checkpoint.folder_of(run.checkpoints, step))
    task = build_task(recipe, mixture)  # anew: the trained model is spread over the processes
    loader = build_loader(
        mixture, rank=0, world_size=1, cursor=Cursor(), pin_memory=False, workers=0, latents=task.latents,
        states=task.states,
    )  # fmt: skip
    part = run.path / ".model.tmp"
    shutil.rmtree(part, ignore_errors=True)
    with closing(loader):
        batches = iter(loader)
        task.export(part, weights, (next(batches) for _ in range(_BATCHES)))
    run.exported.unlink(missing_ok=True)
    shutil.rmtree(run.model, ignore_errors=True)
    part.rename(run.model)
    write_atomic(run.exported, json.dumps({"step": step}) + "\n")
    print(f"exported {run.model}", flush=True)
