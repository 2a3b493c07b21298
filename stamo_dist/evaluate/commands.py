"""`stamo eval …`: measure a tokenizer or a policy. Torch is imported only inside the commands."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stamo_dist.command_options import with_options
from stamo_dist.evaluate import options
from stamo_dist.faults.ended import says_if_ended

if TYPE_CHECKING:
    from stamo_dist.evaluate.measurement import Measurement
    from stamo_dist.evaluate.simulators import SimulatorCatalogue

HELP = """Measure a tokenizer or a policy on held-out episodes.

RUN is the folder of a run, its recipe's run_dir, or the run's name; `stamo demo` trains demo/runs/tokenizer.
"""
app = typer.Typer(no_args_is_help=True, help=HELP)


@dataclass(frozen=True)
class EvalTools:
    """Dependencies of the commands on other packages, put into the context by `stamo_dist.cli`."""

    launch: Callable[[list[str], int, Path], int]  # starts processes with these arguments and returns their exit code
    benchmarks: SimulatorCatalogue
    folder_of: Callable[[Path], Path]  # puts the folder of a run in place of its name; raises RunError


def _by_name(given: Any, folder_of: Callable[[Path], Path]) -> Any:
    """`given`, with the folder of a run in place of its name."""
    if isinstance(given, options.SpeedOptions):
        return given
    field = "policy" if isinstance(given, options.UseOptions) else "run"
    return replace(given, **{field: folder_of(Path(getattr(given, field)))})


def _check_folder(given: Any) -> None:
    """Refuse a wrong folder before torch is imported, which takes seconds."""
    from stamo_dist.evaluate.run_recipe import check_policy, check_tokenizer

    if isinstance(given, options.UseOptions):
        check_policy(given.policy)  # type: ignore[attr-defined]
    elif not isinstance(given, options.SpeedOptions):
        check_tokenizer(given.run)


def _command(asked: type, implementation: str, kept: str) -> Callable[..., None]:
    """Register a command whose options are the fields of `asked`.

    `implementation`: module:name in this package of the measurement class, called with these fields, and with the
    benchmarks if it has a parameter of that name. `kept`: as for `says_if_ended`.
    """

    @with_options(asked)
    def command(context: typer.Context, given: Any) -> None:
        launches = getattr(given, "nproc", 1) > 1 and "RANK" not in os.environ  # it hands the signal on
        with nullcontext() if launches else says_if_ended(kept):
            measure(context.obj, given)

    def measure(tools: EvalTools, given: Any) -> None:
        given = _by_name(given, tools.folder_of)
        _check_folder(given)
        from stamo_dist.evaluate.workers import WorkerGroup, run_in_group

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


_PARTS, _TRIALS = "what was measured is kept", "the trials that were made are kept"
for _name, _asked, _implementation, _kept in (
    ("reconstruct", options.ReconstructOptions, "reconstruct:Reconstruction", _PARTS),
    ("interpolate", options.InterpolateOptions, "interpolate:Interpolation", _PARTS),
    ("probe", options.ProbeOptions, "probe:ActionProbe", _PARTS),
    ("transfer", options.TransferOptions, "transfer:MotionTransfer", _PARTS),
    ("speed", options.SpeedOptions, "speed:speed", ""),
    ("actions", options.ActionsOptions, "actions:ActionErrors", ""),
    ("plan", options.PlanOptions, "plan:GoalPlanning", _TRIALS),
    ("rollout", options.RolloutOptions, "rollout:PolicyRollout", _TRIALS),
):
    app.command(_name)(_command(_asked, _implementation, _kept))


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

    run = context.obj.folder_of(run)
    read_recipe(open_run(run), "policy")
    from stamo_dist.evaluate.rollout import roll_out

    with says_if_ended(_TRIALS):
        roll_out(run, step, context.obj.benchmarks)
