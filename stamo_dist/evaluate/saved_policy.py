"""The policy of a run: what it exported, or one of its checkpoints before anything is exported."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stamo_dist.checkpoint.compatibility import mixture_of
from stamo_dist.checkpoint.manifest import MANIFEST, read_checkpoint_manifest
from stamo_dist.errors import CheckpointError
from stamo_dist.evaluate.result import Provenance, output_folder
from stamo_dist.evaluate.weights import default_device, named_checkpoint, read_recipe
from stamo_dist.export import write_model
from stamo_dist.models.openvla.framing import AS_RECORDED, Use
from stamo_dist.models.policies import AnyPolicy, load_policy
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, open_run

SCRATCH = ".model."  # what a killed process leaves is called so


def exported_at(run: RunFolder) -> tuple[Recipe, int]:
    """The recipe of a run, and the step whose policy it has exported.

    Raises:
        RunError: The run trains something else.
        CheckpointError: It has exported nothing yet.
    """
    recipe = read_recipe(run, "policy")
    if not run.exported.is_file():
        raise CheckpointError(f"{run.path}: nothing exported yet; train it to its end")
    return recipe, int(json.loads(run.exported.read_text())["step"])


def open_policy(
    policy: str | Path, device: str | None = None, tokenizer: str | None = None, use: Use = AS_RECORDED
) -> tuple[AnyPolicy, Provenance]:
    """What a run exported, or released weights, and where they come from.

    `policy`: a run folder, or what `load_policy` takes. `tokenizer`: where the one it sees through moved to.

    Raises:
        RunError: The run trains something else.
        CheckpointError: It has exported nothing yet.
    """
    run = RunFolder(Path(policy))
    if run.resolved.is_file():
        recipe, step = exported_at(run)
        loaded = _load(recipe, run.model, device, tokenizer, use)
        return loaded, Provenance.of_export(recipe, str(run.model), step)
    loaded = load_policy(policy, use=use, device=device or default_device(), tokenizer=tokenizer)
    return loaded, Provenance.of_released(str(policy))


def _load(recipe: Recipe, model: Path, device: str | None, tokenizer: str | None, use: Use) -> AnyPolicy:
    options = {"tokenizer": tokenizer or recipe.policy.tokenizer} if recipe.policy.vision == "stamo" else {}
    return load_policy(model, use=use, device=device or default_device(), **options)


class SavedPolicy:
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
        self._recipe = read_recipe(folder, "policy")
        self._path = named_checkpoint(folder, checkpoint)
        self._manifest = read_checkpoint_manifest(self._path)
        self.digest = digest(self._path)
        scratch = output_folder(folder, name, out)
        self._folder = TemporaryDirectory(prefix=SCRATCH, dir=scratch, ignore_cleanup_errors=True)
        self.model = str(Path(self._folder.name) / "model")
        write_model(self._recipe, mixture_of(self._recipe, self._manifest.recipe), self._path, Path(self.model))

    def open(self, device: str | None, tokenizer: str | None, use: Use) -> tuple[AnyPolicy, Provenance]:
        """The policy, with the averaged weights where the checkpoint has them, and where it comes from."""
        policy = _load(self._recipe, Path(self.model), device, tokenizer, use)
        self._folder.cleanup()  # a large policy must not lie there while it acts
        return policy, Provenance.of_checkpoint(self._recipe, self._path, self._manifest)


def digest(checkpoint: Path) -> str | None:
    """What tells a checkpoint from another of the same step; None where there is no whole one."""
    try:
        marker: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
        return str(marker["sha256"])
    except (OSError, ValueError, KeyError):
        return None
