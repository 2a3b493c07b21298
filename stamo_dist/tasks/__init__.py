"""Training stages: what is particular to each, behind one small interface."""

from __future__ import annotations

from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks.base import Task


def build_task(recipe: Recipe) -> Task:
    """The stage the recipe names, with its model built on the CPU."""
    if recipe.stage == "vae":
        from stamo_dist.tasks.vae import VAETask

        return VAETask(recipe)
    from stamo_dist.tasks.tokenizer import TokenizerTask

    return TokenizerTask(recipe)
