"""`stamo eval …`: measure a tokenizer or a policy. Torch is imported only inside the commands."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stamo_dist.command_options import with_options
from stamo_dist.evaluate import options

if TYPE_CHECKING:
    from stamo_dist.evaluate.measurement import Measurement
    from stamo_dist.evaluate.simulators import SimulatorCatalogue

HELP = """Measure a tokenizer or a policy on held-out episodes.

RUN is the folder of a run, its recipe's run_dir; `stamo demo` trains demo/runs/tokenizer.
"""
app = typer.Typer(no_args_is_help=True, help=HELP)


@dataclass(frozen=True)
class EvalTools:
    """Dependencies of the commands on other packages, put into the context by `stamo_dist.cli`."""

    launch: Callable[[list[str], int, Path], int]  # starts processes with these arguments and returns their exit code
    benchmarks: SimulatorCatalogue


def _check_folder(given: Any) -> None:
    """Refuse a wrong folder before torch is imported, which takes seconds."""
    from stamo_dist.evaluate.run_recipe import check_policy, check_tokenizer

    if isinstance(given, options.UseOptions):
        check_policy(given.policy)  # type: ignore[attr-defined]
    elif not isinstance(given, options.SpeedOptions):
        check_tokenizer(given.run)


def _command(asked: type, implementation: str) -> Callable[..., None]:
    """Register a command whose options are the fields of `asked`.

    `implementation`: module:name in this package of the measurement class, called with these fields, and with the
    benchmarks if it has a parameter of that name.
    """

    @with_options(asked)
    def command(context: typer.Context, given: Any) -> None:
        _check_folder(given)
        from stamo_dist.evaluate.workers import WorkerGroup, run_in_group

        tools: EvalTools = context.obj
        module, name = implementation.split(":")
        make: Callable[..., Measurement] = getattr(import_module(f"{__package__}.{module}"), name)
        brought = {"benchmarks": tools.benchmarks} if "benchmarks" in inspect.signature(make).parameters else {}

        def body(group: WorkerGroup) -> None:
            make(**vars(given), **brought).evaluate(group=group)

        if isinstance(given, options.SharedOptions):
            run_in_group(given.run, given.nproc, tools.launch, body, sys.argv[1:])
        else:
            body(WorkerGroup())

    return command


for _name, _asked, _implementation in (
    ("reconstruct", options.ReconstructOptions, "reconstruct:Reconstruction"),
    ("interpolate", options.InterpolateOptions, "interpolate:Interpolation"),
    ("probe", options.ProbeOptions, "probe:ActionProbe"),
    ("transfer", options.TransferOptions, "transfer:MotionTransfer"),
    ("speed", options.SpeedOptions, "speed:speed"),
    ("actions", options.ActionsOptions, "actions:ActionErrors"),
    ("plan", options.PlanOptions, "plan:GoalPlanning"),
    ("rollout", options.RolloutOptions, "rollout:PolicyRollout"),
):
    app.command(_name)(_command(_asked, _implementation))


@app.command()
def during(
    context: typer.Context,
    run: options.RunArgument,
    step: Annotated[int, typer.Argument(metavar="STEP", help="Of a checkpoint that is still there.")],
) -> None:
    """Roll a policy's checkpoint out as `evaluate.rollout` in its recipe says: what a training does by itself.

    Trials that are there are not made again. The training tells the result at its next look or start.

    Example: stamo eval during runs/policy_openvla_state 4000
    """
    from stamo_dist.evaluate.run_recipe import read_recipe
    from stamo_dist.run.folder import open_run

    read_recipe(open_run(run), "policy")
    from stamo_dist.evaluate.rollout import roll_out

    roll_out(run, step, context.obj.benchmarks)
