"""A policy from a checkpoint of its run, before anything is exported."""

from __future__ import annotations

import json
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from stamo_dist.data.mixture import Mixture
from stamo_dist.engine.checkpoint import MARKER, read_marker
from stamo_dist.engine.runfolder import RunFolder, git_commit
from stamo_dist.errors import RunError
from stamo_dist.evaluate.common import Provenance, named_checkpoint, typed_command
from stamo_dist.export import write_model
from stamo_dist.models.policies import AnyPolicy, load_policy
from stamo_dist.recipe.load import load

SCRATCH = ".model."  # what a killed process leaves is called so


def open_saved(
    run: RunFolder | None, checkpoint: str, scratch: Path, device: str | None, tokenizer: str | None
) -> tuple[AnyPolicy, Provenance, str]:
    """The policy of a checkpoint, with the averaged weights where it has them; where it comes from; its digest.

    `checkpoint`: a step, `best`, or a path. `scratch`: where the model lies while it is read, for a moment.

    Raises:
        RunError: There is no run, or it trains something else.
        CheckpointError: No such checkpoint, or it is not whole.
    """
    if run is None:
        raise RunError(f"--checkpoint {checkpoint}: is of a run folder; leave it out for a folder of weights")
    recipe = load(run.resolved).recipe
    if recipe.stage != "policy":
        raise RunError(f"{run.path}: its recipe trains the {recipe.stage} stage; give the run folder of a policy")
    path = named_checkpoint(run, checkpoint)
    marker = read_marker(path)
    mixture = Mixture(recipe.data, seed=recipe.seed, global_batch=recipe.train.global_batch)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"tokenizer": tokenizer or recipe.policy.tokenizer} if recipe.policy.vision == "stamo" else {}
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=scratch, ignore_cleanup_errors=True) as folder:
        write_model(recipe, mixture, path, Path(folder) / "model")
        policy = load_policy(Path(folder) / "model", device=device, **options)
    provenance = Provenance(
        recipe=recipe.name, data_fingerprint=marker.fingerprint, checkpoint=str(path), step=marker.state.step,
        ema=(path / "ema").is_dir(), trained_commit=marker.git_commit, git_commit=git_commit(), seed=recipe.seed,
        command=typed_command(), date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip
    return policy, provenance, digest(path) or ""


def digest(checkpoint: Path) -> str | None:
    """What tells a checkpoint from another of the same step; None where there is no whole one."""
    try:
        marker: dict[str, Any] = json.loads((checkpoint / MARKER).read_text())
        return str(marker["sha256"])
    except (OSError, ValueError, KeyError):
        return None
