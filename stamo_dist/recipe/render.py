"""A resolved recipe as text, with the origin of each value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from stamo_dist.recipe.lines import is_by_step, show_value
from stamo_dist.recipe.load import Loaded


def render(loaded: Loaded) -> Iterator[Text]:
    """The resolved recipe as YAML lines, each value followed by its origin as a comment."""
    rows = list(_rows(loaded.resolved, loaded.provenance, ()))
    column = min(48, max(text.cell_len for text, _ in rows)) + 2
    for text, origin in rows:
        if origin:
            text.append(" " * max(2, column - text.cell_len))
            text.append(f"# {origin}", style="dim" if origin == "default" else "green")
        yield text


def _rows(tree: dict[str, Any], provenance: dict[str, str], at: tuple[str, ...]) -> Iterator[tuple[Text, str]]:
    for name, value in tree.items():
        here = (*at, name)
        text = Text("  " * len(at)).append(f"{show_value(name)}:", style="cyan")
        if isinstance(value, dict) and value and not is_by_step(value):
            yield text, ""
            yield from _rows(value, provenance, here)
        else:
            origin = provenance[".".join(here)]
            text.append(" ").append(show_value(value, limit=1 << 20), style="dim" if origin == "default" else "bold")
            yield text, origin
