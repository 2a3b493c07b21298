"""What is to be exported, checked before anything is loaded. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stamo_dist.checkpoint.manifest import MANIFEST, CheckpointManifest, read_checkpoint_manifest
from stamo_dist.checkpoint.retention import complete, named
from stamo_dist.errors import RunError
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, open_run


@dataclass(frozen=True)
class Choice:
    """A checkpoint of a run."""

    run: RunFolder
    recipe: Recipe
    checkpoint: Path
    manifest: CheckpointManifest


def choose(given: Path, out: Path, form: str, shard_size: str, checkpoint: str | None = None) -> Choice:
    """The checkpoint that `publish` is to write.

    Args:
        given: A checkpoint, or a run: its newest.
        out: Folder to write.
        form, shard_size: Of `ExportLayout`.
        checkpoint: If `given` is a run: a step, or `best` by success in closed loop.

    Raises:
        RunError: `given` is neither, `out` exists, or the format does not suit the stage or the policy.
        CheckpointError: The checkpoint is incomplete.
    """
    run, folder = _locate(given, checkpoint)
    recipe = load(run.resolved).recipe
    if not re.fullmatch(r"\d+([KMG]i?B|B)?", shard_size, re.IGNORECASE):
        raise RunError(f"--shard-size {shard_size}: give a size as 5GB or 200MB")
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
    return Choice(run, recipe, folder, read_checkpoint_manifest(folder))


def finished(given: Path) -> Choice:
    """The last checkpoint of a run that finished training.

    Raises:
        RunError: It is not a run, or has not finished training.
        CheckpointError: The checkpoint is not whole.
    """
    run = open_run(given)
    recipe = load(run.resolved).recipe
    whole = complete(run.checkpoints)[0]
    manifest = read_checkpoint_manifest(whole[0]) if whole else None
    step = manifest.state.step if manifest else 0
    if manifest is None or step < recipe.train.steps:
        raise RunError(
            f"{given}: trained to step {step} of {recipe.train.steps}; train it to its end, or give OUT for the model "
            "of its newest checkpoint"
        )
    return Choice(run, recipe, whole[0], manifest)


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
