"""Leaving out of a submission what has nothing left to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stamo_dist.launch.ends import newest_step
from stamo_dist.launch.sbatch import JobOrder
from stamo_dist.recipe.difference import differences, resolved_of
from stamo_dist.recipe.load import Loaded
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.trained import already_trained

_OTHERWISE = ("train.steps", "train.checkpoint.grace_seconds")  # said already, set by the cluster


def without_trained(orders: Sequence[JobOrder]) -> tuple[list[JobOrder], list[str]]:
    """(the orders of runs, or of members of an array of them, that are left to train; what is said of the others)."""
    left, said = list[JobOrder](), list[str]()
    for order in orders:
        members = order.members or [order]
        words = [_words(member.loaded) if member.loaded else "" for member in members]
        said += filter(None, words)
        rest = [member for member, trained in zip(members, words, strict=True) if not trained]
        if order.members and rest:
            left.append(replace(rest[0], members=rest))
        else:
            left += rest
    return left, said


def _words(loaded: Loaded) -> str:
    """That the run is trained as far as its recipe asks; "" if it is not."""
    recipe, run = loaded.recipe, RunFolder(Path(loaded.recipe.run_dir))
    step = newest_step(run.path)
    if step is None or step < recipe.train.steps or run.exported_step != step or recipe.evaluate.beside:
        return ""  # what is measured beside the training may be left to do
    words = f"{already_trained(run.path, step, recipe.train.steps)}; nothing is submitted"
    changed = [c for c in differences(resolved_of(run.resolved) or {}, loaded.resolved) if c.field not in _OTHERWISE]
    if changed:
        words += "".join(f"\n  it was trained with another recipe, {change}" for change in changed)
        words += "\n  for a run with this one choose another run_dir"
    return words
