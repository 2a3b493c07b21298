"""`stamo serve`. Torch is imported only inside."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.command_options import with_options
from stamo_dist.errors import RunError
from stamo_dist.evaluate.options import UseOptions
from stamo_dist.run.registry import run_names

_NEEDED = ("json_numpy", "msgpack", "starlette", "uvicorn", "websockets")


@dataclass(kw_only=True)
class ClientOptions:
    """What clients send."""

    frames: Annotated[
        str,
        typer.Option(
            metavar="as-trained|upright",
            help="How clients send frames: turned as the policy was trained, as the official clients do, or upright.",
        ),
    ] = "as-trained"


@dataclass(kw_only=True)
class ServeOptions(ClientOptions, UseOptions):
    """Answer observations with actions, as clients of OpenVLA, OpenVLA-OFT, openpi and vla-eval speak.

    Says how its packages are installed where they are missing. Asks for the token in
    STAMO_SERVE_TOKEN, if it is set.

    Example: stamo serve runs/policy_oft_state --port 8777

    Example: stamo serve moojink/openvla-7b-oft-finetuned-libero-spatial --as oft-libero
    """

    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|EXPORT",
            help="A policy's run, its folder or name, or a folder with weights.",
            autocompletion=run_names,
        ),
    ]
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name under which clients reach this server, besides HOST and localhost; may be repeated.",
        ),
    ] = None
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")] = None
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Where the policy's StaMo tokenizer lies; where it was in training when omitted."),
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Most observations computed at once, of one client or many.")] = 16
    largest_request: Annotated[int, typer.Option(metavar="MIB", min=1, help="Size of the largest request.")] = 32
    unnorm_key: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Source whose units the actions have, if a request names none.")
    ] = None


@with_options(ServeOptions)
def serve(_: typer.Context, asked: ServeOptions) -> None:
    from importlib.util import find_spec

    from stamo_dist.evaluate.run_recipe import check_policy
    from stamo_dist.extras import how_to_install
    from stamo_dist.launch.status import UnknownRunError, folder_of

    with suppress(UnknownRunError):  # what else it may be is told below
        asked = replace(asked, run=folder_of(asked.run))
    check_policy(asked.run)
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise RunError(f"serving needs the packages {', '.join(missing)}; {how_to_install('serve')}")
    from stamo_dist.serve.command import Address
    from stamo_dist.serve.command import serve as answer
    from stamo_dist.serve.limits import MIB, Limits

    answer(
        asked.run,
        Address(asked.host, asked.port, tuple(asked.allow_host or ())),
        device=asked.device,
        tokenizer=asked.tokenizer,
        unnorm_key=asked.unnorm_key,
        frames=asked.frames,
        use=asked.use(),
        limits=Limits(batch=asked.batch, body=asked.largest_request * MIB, decoded=4 * asked.largest_request * MIB),
    )
