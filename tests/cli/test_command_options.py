"""A command made of a dataclass takes what its fields say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from stamo_dist.command_options import with_options


@dataclass(kw_only=True)
class Shared:
    steps: Annotated[int, typer.Option(min=1, help="Of all.")] = 3


@dataclass(kw_only=True)
class Asked(Shared):
    """Do it."""

    place: Annotated[str, typer.Argument()]
    tag: Annotated[list[str], typer.Option()] = field(default_factory=list)
    as_: Annotated[str | None, typer.Option("--as")] = None


@pytest.fixture
def seen() -> list[Asked]:
    return []


@pytest.fixture
def app(seen: list[Asked]) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @with_options(Asked)
    def run(context: typer.Context, asked: Asked) -> None:
        assert context.info_name == "run"
        seen.append(asked)

    return app


def test_what_is_given_and_what_is_not(app: typer.Typer, seen: list[Asked]) -> None:
    for given in (["x"], ["y", "--tag", "a", "--tag", "b", "--as", "c", "--steps", "7"]):
        assert CliRunner().invoke(app, given).exit_code == 0
    assert seen == [Asked(place="x"), Asked(place="y", tag=["a", "b"], as_="c", steps=7)]


@pytest.mark.parametrize(("given", "message"), [([], "Missing argument"), (["x", "--steps", "0"], "--steps")])
def test_what_is_refused(app: typer.Typer, seen: list[Asked], given: list[str], message: str) -> None:
    result = CliRunner().invoke(app, given)
    assert (result.exit_code, seen) == (2, [])
    assert message in result.output


def test_help_is_the_docstring_and_inherited_options_come_last(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    places = [text.index(part) for part in ("Do it.", "--tag", "--as", "--steps")]
    assert places == sorted(places)
