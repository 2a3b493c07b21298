"""Exporting a checkpoint to a folder for publication."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from stamo_dist.checkpoint.compatibility import mixture_of
from stamo_dist.checkpoint.load import read_weights
from stamo_dist.errors import RunError
from stamo_dist.export import export, training_data
from stamo_dist.models.exported import STATE_ENCODER
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.pretrained import checksums
from stamo_dist.publish.card import model_card
from stamo_dist.publish.choice import choose, finished
from stamo_dist.publish.usage import usage
from stamo_dist.run.lease import acquire
from stamo_dist.tasks import build_task
from stamo_dist.tasks.base import ExportLayout


def publish(given: Path, out: Path, layout: ExportLayout, checkpoint: str | None = None) -> None:
    """Write the model of a checkpoint, or of a run's newest one, into the new folder `out`.

    `checkpoint`: if `given` is a run: a step, or `best` by success in closed loop.

    Raises:
        RunError: `given` is neither, `out` exists, or the format does not suit the stage or the policy.
        CheckpointError: The checkpoint is incomplete.
        DataError: The run's data, which has statistics and instructions, is no longer there.
    """
    found = choose(given, out, layout.form, layout.shard_size, checkpoint)
    run, recipe, folder, manifest = found.run, found.recipe, found.checkpoint, found.manifest
    form, dtype = layout.form, str(layout.dtype or torch.float32).removeprefix("torch.")
    weights = read_weights(folder)
    mixture = mixture_of(recipe, manifest.recipe)
    task = build_task(recipe, mixture, meta_init=manifest.holds_all)
    part = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with closing(training_data(mixture, task)) as batches:
            task.export(part, weights, batches, replace(layout, alone=True))
        if recipe.stage == "policy" and recipe.policy.vision == "stamo" and form != "peft":
            seen_through = recipe.policy.tokenizer
            assert seen_through is not None, "the recipe was checked"
            StateEncoder.from_pretrained(seen_through).save_pretrained(part / STATE_ENCODER, seen_through)
        card = model_card(recipe, run, folder, layout, trained=task.trained, use=usage(recipe, layout, part))
        checksums.write(part)
        (part / "README.md").write_text(card, encoding="utf-8")
        _as_others_files(part)
        part.rename(out)
    except OSError as e:
        raise RunError(f"{out}: cannot be written ({e.strerror}); make room or give another folder") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"exported {folder} to {out}: {form}, {dtype}, {size / 1e6:,.1f} MB")


def finish(given: Path) -> None:
    """Write RUN/model of a run that finished training, as the training's last step does.

    Raises:
        RunError: It is not a run, has not finished training, or is training.
        CheckpointError: The checkpoint is not whole.
    """
    found = finished(given)
    run, recipe, manifest = found.run, found.recipe, found.manifest
    with acquire(run.path, patience=0):
        export(recipe, mixture_of(recipe, manifest.recipe), run, manifest.state.step)


def _as_others_files(folder: Path) -> None:
    """Give every file default permissions, as safetensors makes files readable only by their owner."""
    mask = os.umask(0o022)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)
