"""Exporting a checkpoint to a folder for publication."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from stamo_dist.checkpoint.compatibility import mixture_of
from stamo_dist.checkpoint.load import read_weights
from stamo_dist.checkpoint.manifest import MANIFEST, read_checkpoint_manifest
from stamo_dist.checkpoint.retention import complete, named
from stamo_dist.errors import RunError
from stamo_dist.export import export, training_data
from stamo_dist.models.exported import STATE_ENCODER
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.pretrained import checksums
from stamo_dist.publish.card import model_card
from stamo_dist.publish.usage import usage
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import RunFolder, open_run
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
    run, folder = _locate(given, checkpoint)
    recipe = load(run.resolved).recipe
    form, dtype = layout.form, str(layout.dtype or torch.float32).removeprefix("torch.")
    if not re.fullmatch(r"\d+([KMG]i?B|B)?", layout.shard_size, re.IGNORECASE):
        raise RunError(f"--shard-size {layout.shard_size}: give a size as 5GB or 200MB")
    if form != "hf" and recipe.stage != "policy":
        raise RunError(f"--format {form}: is a layout of policies, and {run.path} trains the {recipe.stage}; give hf")
    if form == "openvla" and recipe.policy.vision == "stamo":
        raise RunError(
            f"--format openvla: the official code has no StaMo encoder, through which {run.path} sees "
            "(policy.vision: stamo); give --format hf"
        )
    if form == "peft" and recipe.policy.lora is None:
        raise RunError(f"--format peft: writes adapters, and {run.path} trains none (policy.lora); give --format hf")
    if out.exists():
        raise RunError(f"{out}: exists; give a folder that does not")
    weights = read_weights(folder)
    manifest = read_checkpoint_manifest(folder)
    mixture = mixture_of(recipe, manifest.recipe)
    task = build_task(recipe, mixture, meta_init=manifest.holds_all)
    part = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
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
    run = open_run(given)
    recipe = load(run.resolved).recipe
    whole = complete(run.checkpoints)[0]
    marker = read_checkpoint_manifest(whole[0]) if whole else None
    step = marker.state.step if marker else 0
    if marker is None or step < recipe.train.steps:
        raise RunError(
            f"{given}: trained to step {step} of {recipe.train.steps}; train it to its end, or give OUT for the model "
            "of its newest checkpoint"
        )
    with acquire(run.path, patience=0):
        export(recipe, mixture_of(recipe, marker.recipe), run, step)


def _as_others_files(folder: Path) -> None:
    """Give every file default permissions, as safetensors makes files readable only by their owner."""
    mask = os.umask(0o022)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _locate(given: Path, checkpoint: str | None) -> tuple[RunFolder, Path]:
    """The run and checkpoint named by the user."""
    if checkpoint is not None:
        run = open_run(given)
        return run, named(run.checkpoints, checkpoint)
    if (given / MANIFEST).is_file():
        return open_run(given.resolve().parent.parent), given
    run = open_run(given)
    whole = complete(run.checkpoints)[0]
    if not whole:
        raise RunError(f"{given}: holds no whole checkpoint; `stamo status {given}` says how far it is")
    return run, whole[0]
