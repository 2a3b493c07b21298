"""Further checks of a recipe with local data, registered by the `stamo` command: they need numpy or the simulators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stamo_dist.recipe.schema import Recipe

#: Each returns notes, or raises RecipeError.
FURTHER: list[Callable[[Recipe], list[str]]] = []
