"""Loading the weights to measure: a run's tokenizer or a policy; and the tokenizer's sampling noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from stamo_dist.checkpoint.compatibility import mixture_of
from stamo_dist.checkpoint.load import read_weights
from stamo_dist.checkpoint.manifest import MANIFEST, read_checkpoint_manifest
from stamo_dist.checkpoint.retention import complete, named
from stamo_dist.device import Device
from stamo_dist.errors import CheckpointError
from stamo_dist.evaluate.result import Provenance, output_folder
from stamo_dist.evaluate.run_recipe import read_recipe
from stamo_dist.export import write_model
from stamo_dist.models.openvla.framing import AS_RECORDED, Use
from stamo_dist.models.policies import AnyPolicy, load_policy
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, open_run
from stamo_dist.tasks.noise import Noise

SCRATCH = ".model."  # prefix of temporary folders, which killed processes leave behind


def load_tokenizer(run: RunFolder, recipe: Recipe, checkpoint: str | None = None) -> tuple[Tokenizer, Provenance]:
    """The tokenizer of a run in fp32, on the GPU if there is one, with averaged weights if they exist.

    `checkpoint`: a step, or the path of a checkpoint. When omitted, the newest complete checkpoint; the run's
    export (`model/`) if it has none.

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
    tokenizer.to(Device.current().torch_device).eval()
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
    """The checkpoint named by `--checkpoint`: a step, `best`, or a path.

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
    """A policy from a run's export or released weights, and its provenance.

    `policy`: a run folder, or any argument of `load_policy`. `tokenizer`: the new path of its tokenizer, if moved.

    Raises:
        RunError: The run trains something else.
        CheckpointError: It has exported nothing yet.
    """
    run = RunFolder(Path(policy))
    if run.resolved.is_file():
        recipe, step = exported_at(run)
        loaded = _load(recipe, run.model, device, tokenizer, use)
        return loaded, Provenance.of_export(recipe, str(run.model), step)
    loaded = load_policy(policy, use=use, device=str(Device.named(device).torch_device), tokenizer=tokenizer)
    return loaded, Provenance.of_released(str(policy))


def _load(recipe: Recipe, model: Path, device: str | None, tokenizer: str | None, use: Use) -> AnyPolicy:
    options = {"tokenizer": tokenizer or recipe.policy.tokenizer} if recipe.policy.vision == "stamo" else {}
    return load_policy(model, use=use, device=str(Device.named(device).torch_device), **options)


class SavedPolicy:
    """The exported model of a checkpoint, in a temporary folder that exists until it is opened.

    Args:
        run: The run folder.
        checkpoint: A step, `best`, or a path.
        out, name: Folder of the results, in which the model is written; RUN/eval/NAME if `out` is None.

    Raises:
        RunError: It is not a run folder, or the run trains something else.
        CheckpointError: No such checkpoint, or it is incomplete.
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
        """The policy, with averaged weights if the checkpoint has them, and its provenance."""
        policy = _load(self._recipe, Path(self.model), device, tokenizer, use)
        self._folder.cleanup()  # removed before acting, as it may be large
        return policy, Provenance.of_checkpoint(self._recipe, self._path, self._manifest)


def digest(checkpoint: Path) -> str | None:
    """A digest that distinguishes checkpoints of the same step; None if there is no complete one."""
    try:
        marker: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
        return str(marker["sha256"])
    except (OSError, ValueError, KeyError):
        return None
