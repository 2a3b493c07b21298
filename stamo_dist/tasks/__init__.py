"""Training stages, behind one small interface."""

from __future__ import annotations

from stamo_dist.data.mixture import Mixture
from stamo_dist.recipe.policy import DiffusionPolicyConfig
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks.base import Task


def check_task(recipe: Recipe, mixture: Mixture) -> None:
    """Check that the stage can use the data, before anything is built or written.

    Raises:
        StamoError: It cannot; lists all problems.
    """
    if recipe.stage == "policy":
        from stamo_dist.tasks.policy_data import PolicyData

        PolicyData(recipe, mixture)


def build_task(recipe: Recipe, mixture: Mixture, *, meta_init: bool = False, unfilled: bool = False) -> Task:
    """The recipe's stage, with its model built on the CPU.

    With `meta_init`, parameters that a checkpoint supplies are on the meta device until `Task.load_weights`; with
    `unfilled` those of the large part (a tokenizer's decoder, OpenVLA) also where they would be random: the caller
    gives them memory and values.
    """
    if recipe.stage == "vae":
        from stamo_dist.tasks.vae import VAETask

        return VAETask(recipe)
    if recipe.stage == "policy" and isinstance(recipe.policy, DiffusionPolicyConfig):
        from stamo_dist.tasks.diffusion import DiffusionTask

        return DiffusionTask(recipe, mixture, recipe.policy)
    if recipe.stage == "policy":
        from stamo_dist.tasks.policy import PolicyTask

        return PolicyTask(recipe, mixture, meta_init=meta_init, unfilled=unfilled)
    from stamo_dist.tasks.tokenizer import TokenizerTask

    return TokenizerTask(recipe, meta_init=meta_init, unfilled=unfilled)
