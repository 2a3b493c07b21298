"""Further checks of a recipe with local data, registered by the `stamo` command: they need numpy or the simulators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stamo_dist.recipe.schema import Recipe


@dataclass(frozen=True)
class Further:
    """A check.

    Attributes:
        look: Returns notes, or raises RecipeError.
        reads: Sections of the recipe that must be valid for it.
    """

    look: Callable[[Recipe], list[str]]
    reads: tuple[str, ...]


FURTHER: list[Further] = []
