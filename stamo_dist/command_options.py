"""Commands whose options are a dataclass: a field is an option, with its type, default, help and limits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_type_hints

import typer

Options = TypeVar("Options")


def with_options(options: type[Options]) -> Callable[[Callable[[typer.Context, Options], None]], Callable[..., None]]:
    """Decorator that makes a command of a function of typer's context and an instance of the dataclass `options`.

    The command's help is the docstring of `options`; its options have the order of the fields, inherited ones last.
    """
    hints = get_type_hints(options, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
    for field in sorted(fields(options), key=lambda field: field.name not in options.__annotations__):  # type: ignore[arg-type]
        parameters.append(inspect.Parameter(field.name, kind, default=_default(field), annotation=hints[field.name]))

    def make(run: Callable[[typer.Context, Options], None]) -> Callable[..., None]:
        def command(context: typer.Context, **given: Any) -> None:
            run(context, options(**given))

        command.__name__, command.__doc__ = run.__name__, options.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return make


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default
