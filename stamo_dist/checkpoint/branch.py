"""A decay branch: from a checkpoint of the stable phase of a run, a run of its own in which the learning rate falls."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from stamo_dist.checkpoint.manifest import damage, damaged, read_checkpoint_manifest
from stamo_dist.checkpoint.retention import complete
from stamo_dist.errors import CheckpointError, RunError
from stamo_dist.optim.schedule import RateSchedule
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run import lineage
from stamo_dist.run.folder import RunFolder

_STABLE = ("wsd", "constant")


def branch(recipe: Path, overrides: Sequence[str], step: int) -> list[str]:
    """Make the run folder of the branch, which begins with the checkpoint of `step`; returns all its overrides.

    The branch is called NAME-STEP and ends with the decay: `optimizer.decay_steps` more steps, or that share of all
    its steps. A branch that is there already is left as it is, and goes on.

    Raises:
        StamoError: The recipe has problems, or the run no complete checkpoint of that step in its stable phase.
    """
    parent = load(recipe, overrides).recipe
    run, options = RunFolder(Path(parent.run_dir)), parent.optimizer
    share = options.decay_steps
    decay = share if isinstance(share, int) else max(1, round(step * share / (1 - share)))
    changes = [
        f"name={parent.name}-{step}",
        f"run_dir={parent.run_dir}-{step}",
        f"train.steps={step + decay}",
        "optimizer.schedule=wsd",
        f"optimizer.decay_steps={decay}",
    ]
    child = RunFolder(Path(load(recipe, [*overrides, *changes]).recipe.run_dir))
    if not complete(child.checkpoints)[0]:
        _begin(run, child, step, parent)
    return [*overrides, *changes]


def _begin(run: RunFolder, child: RunFolder, step: int, parent: Recipe) -> None:
    source = run.checkpoints / f"step_{step:08d}"
    try:
        manifest = read_checkpoint_manifest(source)
    except CheckpointError as e:
        there = ", ".join(str(int(p.name.removeprefix("step_"))) for p in reversed(complete(run.checkpoints)[0]))
        raise RunError(
            f"--branch {step}: {e}; {run.path} has checkpoints of {f'steps {there}' if there else 'no step'} "
            "(train.checkpoint.keep_every keeps some for ever)"
        ) from e
    schedule = RateSchedule.from_dict(manifest.state.schedule) if manifest.state.schedule else RateSchedule.of(parent)
    falls = schedule.steps - schedule.decay if schedule.shape == "wsd" else schedule.steps
    if schedule.shape not in _STABLE or not schedule.warmup <= manifest.state.updates <= falls:
        phase = f"it is {schedule.shape}; train the run with optimizer.schedule: wsd or constant"
        if schedule.shape in _STABLE:
            phase = f"the learning rate is stable from step {schedule.warmup} to {falls}"
        raise RunError(f"--branch {step}: not a step in which the learning rate of {run.path} is stable: {phase}")
    if wrong := damage(source, manifest):
        raise RunError(f"--branch {step}: {damaged(source, wrong)}")
    child.prepare()
    lineage.write(child.path, lineage.Parent("branch", str(run.path.resolve()), step))
    _link(source, child.checkpoints / source.name)


def _link(source: Path, target: Path) -> None:
    """A second name for the files of a checkpoint, or a copy on another disk; whole or not there."""
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(source, part, copy_function=_link_or_copy)
        part.rename(target)
    except OSError as e:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(f"{target}: cannot be written ({e.strerror})") from e


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
