"""A policy from a checkpoint of its run, before anything is exported."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from stamo_dist.checkpoint.compatibility import mixture_of
from stamo_dist.checkpoint.manifest import MARKER, read_marker
from stamo_dist.errors import RunError
from stamo_dist.evaluate.result import Provenance, output_folder
from stamo_dist.evaluate.weights import named_checkpoint
from stamo_dist.export import write_model
from stamo_dist.models.openvla.framing import Use
from stamo_dist.models.policies import AnyPolicy, load_policy
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import open_run

SCRATCH = ".model."  # what a killed process leaves is called so


class Saved:
    """The exported model of a checkpoint, in a folder that is there until it is opened.

    Args:
        run: The run folder.
        checkpoint: A step, `best`, or a path.
        out, name: Where results go; RUN/eval/NAME when `out` is None. The model is written there.

    Raises:
        RunError: It is no run folder, or the run trains something else.
        CheckpointError: No such checkpoint, or it is not whole.
    """

    def __init__(self, run: str, checkpoint: str, out: Path | None, name: str):
        folder = open_run(run)
        self._recipe = load(folder.resolved).recipe
        if self._recipe.stage != "policy":
            raise RunError(f"{run}: its recipe trains the {self._recipe.stage} stage; give the run folder of a policy")
        self._path = named_checkpoint(folder, checkpoint)
        self._marker = read_marker(self._path)
        self.digest = digest(self._path)
        scratch = output_folder(folder, name, out)
        self._folder = TemporaryDirectory(prefix=SCRATCH, dir=scratch, ignore_cleanup_errors=True)
        self.model = str(Path(self._folder.name) / "model")
        write_model(self._recipe, mixture_of(self._recipe, self._marker.identity), self._path, Path(self.model))

    def open(self, device: str | None, tokenizer: str | None, use: Use) -> tuple[AnyPolicy, Provenance]:
        """The policy, with the averaged weights where the checkpoint has them, and where it comes from."""
        recipe, marker = self._recipe, self._marker
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options = {"tokenizer": tokenizer or recipe.policy.tokenizer} if recipe.policy.vision == "stamo" else {}
        policy = load_policy(self.model, use=use, device=device, **options)
        self._folder.cleanup()  # a large policy must not lie there while it acts
        return policy, Provenance.of_checkpoint(recipe, self._path, marker)


def digest(checkpoint: Path) -> str | None:
    """What tells a checkpoint from another of the same step; None where there is no whole one."""
    try:
        marker: dict[str, Any] = json.loads((checkpoint / MARKER).read_text())
        return str(marker["sha256"])
    except (OSError, ValueError, KeyError):
        return None
