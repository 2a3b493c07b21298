"""What a user says of a policy that was not trained here: the same options wherever one is opened."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def count(help: str, least: int = 1) -> Any:
    """An option that is a number, `least` or more."""
    return typer.Option(metavar="N", min=least, help=help)


def named(metavar: str, help: str, *flags: str) -> Any:
    """An option shown as --NAME METAVAR; `flags`: its names where they are not the parameter's."""
    return typer.Option(*flags, metavar=metavar, help=help)


AsOption = Annotated[
    str | None,
    named(
        "PRESET",
        "Run a released policy as its authors do: openvla-libero, oft-libero, openvla-bridge or oft-aloha.",
        "--as",
    ),
]
OrientationOption = Annotated[
    str | None,
    named(
        "upright|mirrored|flipped_vertically|rotated_180",
        "How it sees an upright frame; as its folder or --as says when omitted.",
    ),
]
CropOption = Annotated[
    float | None, named("SHARE", "Of the frame's area, the centre that it sees; 1 is all. As --orientation.")
]
ViewsOption = Annotated[int | None, count("Cameras it looks at; as its folder or --as says when omitted.")]
ChunkOption = Annotated[int | None, count("Actions it predicts at once; as its folder or --as says.")]
BoundsOption = Annotated[str | None, named("q99|minmax", "What -1 and 1 stand for; as its folder or --as says.")]
CamerasOption = Annotated[
    list[str] | None, named("NAME", "What it sees, in the order of its views; as trained when omitted.")
]
ActionsOption = Annotated[
    str | None,
    named(
        "delta|original|openvla",
        "What its numbers mean, see docs/evaluate.md; delta, or as the preset says, when omitted.",
    ),
]


def split(values: list[str]) -> list[str]:
    """Options may be repeated or separated by commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]
