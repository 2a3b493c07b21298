"""Whether a folder is a run, or a policy, that can be measured or served. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from stamo_dist.errors import RunError
from stamo_dist.pretrained.place import hub_id
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, open_run


def read_recipe(run: RunFolder, stage: str = "tokenizer") -> Recipe:
    """The resolved recipe of a run.

    Raises:
        RunError: The run trains something else.
    """
    recipe = load(run.resolved).recipe
    if recipe.stage != stage:
        raise RunError(f"{run.path}: its recipe trains the {recipe.stage} stage; give the run folder of a {stage}")
    return recipe


def check_tokenizer(run: Path) -> None:
    """Raises: RunError: Not the run folder of a tokenizer."""
    read_recipe(open_run(run))


def _is_beside_others(folder: Path) -> bool:
    return "@" not in folder.name and folder.parent.is_dir()


def check_policy(policy: str | Path) -> None:
    """Raises: RunError: Neither the run folder of a policy, nor a folder with weights, nor a hub id."""
    folder = Path(policy).expanduser()
    if RunFolder(folder).resolved.is_file():
        read_recipe(RunFolder(folder), "policy")
    elif not folder.exists() and (hub_id(str(policy)) is None or _is_beside_others(folder)):
        raise RunError(
            f"{policy}: no such folder; give the run folder of a policy, an exported folder (`stamo export RUN "
            f"{policy}` makes one), or a hub id (owner/name, owner/name@main where there is a folder owner)"
        )
