"""The weights of a run that are measured, and the noise they sample from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stamo_dist.checkpoint.load import read_weights
from stamo_dist.checkpoint.manifest import read_checkpoint_manifest
from stamo_dist.checkpoint.retention import complete, named
from stamo_dist.errors import CheckpointError, RunError
from stamo_dist.evaluate.result import Provenance
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder
from stamo_dist.tasks.noise import Noise


def read_recipe(run: RunFolder, stage: str = "tokenizer") -> Recipe:
    """The resolved recipe of a run.

    Raises:
        RunError: The run trains something else.
    """
    recipe = load(run.resolved).recipe
    if recipe.stage != stage:
        raise RunError(f"{run.path}: its recipe trains the {recipe.stage} stage; give the run folder of a {stage}")
    return recipe


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(run: RunFolder, recipe: Recipe, checkpoint: str | None = None) -> tuple[Tokenizer, Provenance]:
    """The tokenizer of a run in fp32, on the GPU where there is one, with the averaged weights where they were kept.

    `checkpoint`: a step, or the path of a checkpoint. When omitted, the newest whole checkpoint; the run's export
    (`model/`) when it has none.

    Raises:
        CheckpointError: No such checkpoint, or none yet.
        RecipeError: The recipe's frozen parts cannot be built.
    """
    path = _find_checkpoint(run, checkpoint)
    if path is None:
        tokenizer = Tokenizer.from_pretrained(run.model)
        provenance = Provenance.of_export(recipe, str(run.model), recipe.train.steps)
    else:
        provenance = Provenance.of_checkpoint(recipe, path, read_checkpoint_manifest(path))
        tokenizer = Tokenizer.from_config(recipe.model, recipe.flow, recipe.data.image_size)
        tokenizer.trained.load_state_dict(read_weights(path))
    tokenizer.to(default_device()).eval()
    return tokenizer, provenance


def _find_checkpoint(run: RunFolder, checkpoint: str | None) -> Path | None:
    if checkpoint is not None:
        return named_checkpoint(run, checkpoint)
    whole, broken = complete(run.checkpoints)
    if whole:
        return whole[0]
    if (run.model / "stamo.json").is_file():
        return None
    why = "".join(f"\n  {b}" for b in broken)
    raise CheckpointError(
        f"{run.path}: no checkpoint yet; train on until the first is saved (train.checkpoint.every){why}"
    )


def named_checkpoint(run: RunFolder, name: str) -> Path:
    """What `--checkpoint` names: a step, `best`, or a path.

    Raises:
        CheckpointError: There is none.
    """
    try:
        return named(run.checkpoints, name)
    except CheckpointError as e:
        raise CheckpointError(f"--checkpoint {e}") from None


def sampler_noise(tokenizer: Tokenizer, samples: Sequence[int], stream: int = 1) -> Tensor:
    """Noise of these samples, (B, C, h, w): step 0 of seed 0, which no training step uses, the same for every run."""
    ids = torch.tensor(samples, dtype=torch.int64, device=tokenizer.device)
    return Noise(0).at(0).normal(ids, tokenizer.latent_shape, stream)
