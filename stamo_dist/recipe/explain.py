"""Documentation of recipe fields: as tables for people, and as a JSON schema for editors."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stamo_dist.errors import StamoError
from stamo_dist.recipe.fields import ROOT, RecipeField, all_fields, find
from stamo_dist.recipe.layers import did_you_mean
from stamo_dist.recipe.lines import dotted
from stamo_dist.recipe.schema import Recipe


def explain(path: str = "") -> RenderableType:
    """Type, default and meaning of a field, or of all fields of a section; the sections when `path` is empty.

    Raises:
        StamoError: No such field; the message offers the closest one.
    """
    key = tuple(path.split(".")) if path else ()
    field = find(key)
    if field is None:
        known = [dotted(f.key) for f in all_fields()]
        same_name = [name for name in known if name.rpartition(".")[2] == key[-1]][:3]
        hint = f"did you mean {' or '.join(same_name)}?" if same_name else did_you_mean(path, known)
        raise StamoError(f"{path}: no such field; {hint or '`stamo recipe explain` lists the sections'}")
    children = list(field.children())
    head = Text(field.doc if field is not ROOT else "A recipe: one run.")
    if path:
        head = Text.assemble((dotted(field.key), "bold cyan"), "  ", head)
    if not children:
        lines = Text.assemble(("Type     ", "dim"), field.words, ("\nDefault  ", "dim"), field.default)
        return Group(head, lines)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("field", style="cyan", no_wrap=True)
    table.add_column("type", max_width=34)
    table.add_column("default", max_width=16)
    table.add_column("meaning")
    for child in children:
        name = dotted(child.key[len(key) :])
        required = Text(child.default, style="bold" if child.required else "")
        table.add_row(name, _kind(child), required, child.doc)
    below = [dotted(c.key) for c in children if list(c.children())]
    parts: list[RenderableType] = [head, "", table]
    if below:
        parts += ["", Text(f"More: stamo recipe explain {below[0]}", style="dim")]
    return Group(*parts)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe *file*: a fragment may leave anything out, say `extends`, and null a source.

    With `# yaml-language-server: $schema=FILE` as the first line of a recipe, editors complete and check it.
    """
    schema = Recipe.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    names = {"type": "string"}
    schema["properties"]["extends"] = {
        "description": "Recipe files to start from, relative to this file; later ones win, this file wins over all.",
        "anyOf": [names, {"type": "array", "items": names}],
    }
    policy = schema["properties"]["policy"]
    policy["anyOf"] = policy.pop("oneOf")  # a fragment may fit both kinds
    sources = schema["$defs"]["Data"]["properties"]["sources"]
    sources["additionalProperties"] = {
        "description": "null removes an inherited source.",
        "anyOf": [sources["additionalProperties"], {"type": "null"}],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "stamo recipe"}


def _kind(field: RecipeField) -> str:
    return "section" if field.section else "NAME → section" if field.entry else field.words.removeprefix("a ")
