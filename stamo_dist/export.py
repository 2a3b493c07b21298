"""Exporting the model of a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from stamo_dist.checkpoint.load import read_weights
from stamo_dist.checkpoint.manifest import read_checkpoint_manifest
from stamo_dist.checkpoint.retention import folder_of
from stamo_dist.data.loader import Batch, CacheKeys, Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.pretrained import checksums
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, write_atomic
from stamo_dist.tasks import build_task
from stamo_dist.tasks.base import Task

_BATCHES = 16


def export(recipe: Recipe, mixture: Mixture, run: RunFolder, step: int) -> None:
    """Write `run.model` from the checkpoint of `step`; one process calls it.

    Raises:
        CheckpointError: The checkpoint is not whole.
    """
    part = run.path / ".model.tmp"
    write_model(recipe, mixture, folder_of(run.checkpoints, step), part)
    run.exported.unlink(missing_ok=True)
    shutil.rmtree(run.model, ignore_errors=True)
    part.rename(run.model)
    write_atomic(run.exported, json.dumps({"step": step}) + "\n")
    print(f"exported {run.model}", flush=True)


def write_model(recipe: Recipe, mixture: Mixture, path: Path, folder: Path) -> None:
    """Write the model of the checkpoint at `path` into `folder`, replacing its content.

    Raises:
        CheckpointError: The checkpoint is not whole.
    """
    weights = read_weights(path)
    # Anew, as the trained model is spread over the processes; around the weights that were just read, where they do.
    task = build_task(recipe, mixture, meta_init=read_checkpoint_manifest(path).holds_all)
    shutil.rmtree(folder, ignore_errors=True)
    with closing(training_data(mixture, task)) as batches:
        task.export(folder, weights, batches)
    checksums.write(folder)


def training_data(mixture: Mixture, task: Task) -> Generator[Batch, None, None]:
    """The first batches of the run, for models that are fitted to data on export."""
    caches = CacheKeys(task.latents, task.states)
    loader = build_loader(mixture, rank=0, world_size=1, cursor=Cursor(), workers=0, caches=caches)
    with closing(loader):
        batches = iter(loader)
        for _ in range(_BATCHES):
            yield next(batches)
