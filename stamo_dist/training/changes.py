"""What a start changes of the run that it goes on with: fields of its recipe, and the learning rate's schedule."""

from __future__ import annotations

from pathlib import Path

from stamo_dist.checkpoint.manifest import Checkpoint
from stamo_dist.distributed.collectives import broadcast
from stamo_dist.distributed.rank import World
from stamo_dist.optim.schedule import RateSchedule, continued
from stamo_dist.recipe.difference import Change, differences, resolved_of
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run import lineage
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.recipe_history import as_of
from stamo_dist.run.state import RunState


def schedule_of(recipe: Recipe, run: RunFolder, state: RunState, world: World) -> tuple[RateSchedule, list[str]]:
    """The learning rate's schedule, changed or not since the checkpoint, and notes; the same on every process."""
    if state.schedule:
        before = RateSchedule.from_dict(state.schedule)
    else:  # no checkpoint, or an early one: as of the last start
        last = broadcast(resolved_of(run.resolved) if state.step and world.is_main else None)
        before = RateSchedule.of(Recipe.model_validate(last) if last else recipe)
    return continued(before, recipe, state.updates)


def changes(recipe: Recipe, run: RunFolder, checkpoint: Checkpoint | None) -> tuple[list[Change], list[str]]:
    """What differs between the recipe of the last start, or of the run it goes on from, and this one; and notes."""
    of = run
    if checkpoint is not None and not run.resolved.is_file():
        parent = lineage.read(run.path)
        of = RunFolder(Path(parent.run) if parent else checkpoint.path.parent.parent)
    last = resolved_of(of.resolved)
    if last is None:
        lost = f"{of.resolved}: cannot be read, so what this start changes of the recipe is not known"
        return [], [lost] if checkpoint is not None else []
    if of is not run and checkpoint is not None:
        last = as_of(of, last, checkpoint.manifest.state.step)
    return differences(last, recipe.model_dump(mode="json")), []
