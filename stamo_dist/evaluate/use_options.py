"""What a user says of a policy that was not trained here: the same options wherever one is opened."""

from __future__ import annotations

from typing import Annotated

import typer

AsOption = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="PRESET",
        help="Run a released policy as its authors do: openvla-libero, oft-libero, openvla-bridge or oft-aloha.",
    ),
]
OrientationOption = Annotated[
    str | None,
    typer.Option(
        metavar="upright|mirrored|flipped_vertically|rotated_180",
        help="How it sees an upright frame; as its folder or --as says when omitted.",
    ),
]
CropOption = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Of the frame's area, the centre that it sees; 1 is all. As --orientation."),
]
ViewsOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Cameras it looks at; as its folder or --as says when omitted.")
]
ChunkOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Actions it predicts at once; as its folder or --as says.")
]
BoundsOption = Annotated[
    str | None, typer.Option(metavar="q99|minmax", help="What -1 and 1 stand for; as its folder or --as says.")
]
CamerasOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="What it sees, in the order of its views; as trained when omitted."),
]
ActionsOption = Annotated[
    str | None,
    typer.Option(
        metavar="delta|original|openvla",
        help="What its numbers mean, see docs/evaluate.md; delta, or as the preset says, when omitted.",
    ),
]


def split(values: list[str]) -> list[str]:
    """Options may be repeated or separated by commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]
