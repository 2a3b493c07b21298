"""`stamo eval …`: measure a tokenizer or a policy. Torch is imported only inside the commands."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from stamo_dist.evaluate import options
from stamo_dist.evaluate.options import OutOption
from stamo_dist.evaluate.use_options import (
    ActionsOption,
    AsOption,
    BoundsOption,
    CamerasOption,
    ChunkOption,
    CropOption,
    OrientationOption,
    ViewsOption,
)
from stamo_dist.evaluate.use_options import split as names

app = typer.Typer(no_args_is_help=True, help="Measure a tokenizer or a policy on held-out episodes.")

ProcessesOption = Annotated[int, typer.Option("--nproc", metavar="N", min=1, help="Processes that measure together.")]

if TYPE_CHECKING:
    from stamo_dist.evaluate.measurement import Measurement


def _command(asked: type, implementation: str) -> Callable[..., None]:
    """A command whose parameters are the fields of the options `asked`.

    `implementation`: module:name in this package of what makes the measurement of these fields.
    """

    def command(context: typer.Context, **given: Any) -> None:
        from stamo_dist.evaluate.workers import WorkerGroup, run_in_group

        module, name = implementation.split(":")
        make: Callable[..., Measurement] = getattr(import_module(f"{__package__}.{module}"), name)

        def body(group: WorkerGroup) -> None:
            make(**given).evaluate(group=group)

        if "nproc" in given:
            run_in_group(given["run"], given["nproc"], context.obj, body, sys.argv[1:])
        else:
            body(WorkerGroup())

    hints = get_type_hints(asked, include_extras=True)
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for field in fields(asked):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = asked.__doc__
    return command


for _name, _asked, _implementation in (
    ("reconstruct", options.ReconstructOptions, "reconstruct:Reconstruction"),
    ("interpolate", options.InterpolateOptions, "interpolate:Interpolation"),
    ("probe", options.ProbeOptions, "probe:ActionProbe"),
    ("transfer", options.TransferOptions, "transfer:MotionTransfer"),
    ("speed", options.SpeedOptions, "speed:speed"),
):
    app.command(_name)(_command(_asked, _implementation))


@app.command()
def actions(
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="A policy's run folder, or a folder or hub id with its weights.")
    ],
    *,
    shards: Annotated[
        str | None,
        typer.Option(metavar="SHARDS", help="Converted source on which released weights act; a run knows its own."),
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Whose episodes.")] = "val",
    cameras: CamerasOption = None,
    actions: ActionsOption = None,
    as_: AsOption = None,
    orientation: OrientationOption = None,
    crop: CropOption = None,
    views: ViewsOption = None,
    chunk: ChunkOption = None,
    bounds: BoundsOption = None,
    unnorm_key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose statistics scale the actions; those called as the shards are."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="The StaMo tokenizer it sees through, where it moved.")
    ] = None,
    frames: Annotated[int, typer.Option(metavar="N", min=1, help="Most held-out frames of each source.")] = 256,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Moments at once.")] = 16,
    out: OutOption = None,
) -> None:
    """How far a policy's chunks are from the actions of held-out episodes, beside the mean action.

    Example: stamo eval actions demo/runs/policy_rdt_1real_4video

    Example: stamo eval actions weights/openvla-7b-libero --as openvla-libero --shards shards/libero_goal --out goal
    """
    from stamo_dist.evaluate.actions import actions as measure
    from stamo_dist.models.openvla.framing import Use

    measure(
        policy, shards=shards, split=split, cameras=names(cameras or []), convention=actions,
        use=Use(as_, orientation, crop, views, chunk, bounds), unnorm_key=unnorm_key, tokenizer=tokenizer,
        frames=frames, batch=batch, out=out,
    )  # fmt: skip
