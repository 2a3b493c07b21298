"""Recipes, pipelines and fragments by name: those of the working directory first, then those that come with stamo."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from stamo_dist import shipped

FOLDER = Path("recipes")
_SUFFIXES = ("", ".yaml", ".yml")


def find_recipe(given: str | Path) -> Path:
    """The file of a recipe: `given` if there is one, or that of this name; `given` where there is none.

    `tokenizer_demo`, `tokenizer_demo.yaml` and `recipes/tokenizer_demo.yaml` are one name. A folder of the same name
    hides nothing.
    """
    given = Path(given)
    if given.is_file() or given.is_absolute() or ".." in given.parts:
        return given
    below = given.relative_to(FOLDER) if given.parts[:1] == FOLDER.parts else given
    candidates = (folder / f"{below}{suffix}" for folder in _folders() for suffix in _SUFFIXES)
    return next((path for path in candidates if path.is_file()), given)


def shipped_recipe(name: str) -> Path:
    """The recipe of this name that comes with stamo; a file that is not there where none does."""
    candidates = [shipped.RECIPES / f"{name}{suffix}" for suffix in _SUFFIXES]
    inside = ".." not in Path(name).parts
    return next((path for path in candidates if inside and path.is_file()), candidates[0])


def names() -> dict[str, Path]:
    """Name → file of all that can be found by name, one's own first."""
    own, theirs = (dict(_named(folder)) for folder in _folders())
    return own | {name: path for name, path in theirs.items() if name not in own}


def closest(given: Path) -> str:
    """The name most like `given`, or ""."""
    close = difflib.get_close_matches(given.with_suffix("").as_posix(), names(), n=1)
    return close[0] if close else ""


def _named(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*.yaml")):
        yield path.relative_to(folder).with_suffix("").as_posix(), path


def _folders() -> tuple[Path, Path]:
    return FOLDER, shipped.RECIPES
