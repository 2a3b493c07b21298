"""`stamo eval plan` and `rollout`: measurements in a simulator, which the caller of `register` brings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stamo_dist.errors import DataError, RecipeError
from stamo_dist.evaluate.options import CheckpointOption, OutOption, RunArgument
from stamo_dist.evaluate.use_options import (
    ActionsOption,
    AsOption,
    BoundsOption,
    CamerasOption,
    ChunkOption,
    CropOption,
    OrientationOption,
    ViewsOption,
    split,
)

if TYPE_CHECKING:
    from stamo_dist.evaluate.simulators import Benchmarks
    from stamo_dist.recipe.schema import Recipe

TasksOption = Annotated[
    list[str],
    typer.Option(
        help="LIBERO: SUITE, SUITE/INDEX or SUITE/NAME; Meta-World: reach-v3, …; ManiSkill: PickCube-v1, …. "
        "Repeat or separate by commas."
    ),
]
ProcessesOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Simulators at once; as cores and memory allow when omitted.")
]
StepLimit = Annotated[
    int | None, typer.Option("--max-steps", metavar="N", min=1, help="Steps of a trial; the benchmark's when omitted.")
]
VideosOption = Annotated[int, typer.Option(metavar="N", min=0, help="Most videos shown of each task.")]
BothVideosOption = Annotated[
    int, typer.Option("--videos", metavar="N", min=0, help="Videos kept of each task's successes, and of its failures.")
]


def register(app: typer.Typer, benchmarks: Benchmarks) -> None:
    """Add the commands to `app`."""

    @app.command()
    def plan(
        run: RunArgument,
        tasks: TasksOption,
        *,
        benchmark: Annotated[
            str | None,
            typer.Option(metavar="libero|metaworld|maniskill", help="The format of the source when omitted."),
        ] = None,
        source: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="Where the head learns; all sources of the benchmark if omitted."),
        ] = None,
        checkpoint: CheckpointOption = None,
        trials: Annotated[int, typer.Option(metavar="N", min=1, help="Trials of each task and agent.")] = 20,
        k: Annotated[int, typer.Option("--k", metavar="N", min=1, help="Actions between two looks.")] = 4,
        epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Most epochs a head is trained.")] = 60,
        max_steps: StepLimit = None,
        processes: ProcessesOption = None,
        videos: VideosOption = 1,
        seed: Annotated[int, typer.Option(metavar="N", help="Of the heads and the random agent.")] = 0,
        out: OutOption = None,
    ) -> None:
        """Let the probe's head drive a simulated robot from (now, goal image), beside the same head on other motions.

        Started again after a kill it goes on; with more --trials it adds them.

        Example: stamo eval plan runs/tokenizer_demo --tasks libero_spatial/2 --trials 20
        """
        from stamo_dist.evaluate.plan import plan as measure

        measure(
            run, benchmarks, tasks=split(tasks), benchmark=benchmark, source=split(source or []), checkpoint=checkpoint,
            trials=trials, k=k, epochs=epochs, max_steps=max_steps, processes=processes, videos=videos, seed=seed,
            out=out,
        )  # fmt: skip

    @app.command()
    def rollout(
        policy: Annotated[
            str, typer.Argument(metavar="POLICY", help="A policy's run folder, or a folder or hub id with its weights.")
        ],
        tasks: TasksOption,
        *,
        benchmark: Annotated[
            str | None,
            typer.Option(
                metavar="libero|metaworld|maniskill", help="Which simulator; that of the training data when omitted."
            ),
        ] = None,
        trials: Annotated[int, typer.Option(metavar="N", min=1, help="Trials of each task.")] = 20,
        cameras: CamerasOption = None,
        size: Annotated[
            int | None, typer.Option(metavar="PIXELS", min=16, help="Side of the frames; as trained when omitted.")
        ] = None,
        actions: ActionsOption = None,
        as_: AsOption = None,
        orientation: OrientationOption = None,
        crop: CropOption = None,
        views: ViewsOption = None,
        chunk: ChunkOption = None,
        bounds: BoundsOption = None,
        unnorm_key: Annotated[
            str | None,
            typer.Option(
                metavar="NAME", help="Source whose statistics scale the actions; the benchmark's or suite's own."
            ),
        ] = None,
        act_steps: Annotated[
            int | None, typer.Option(metavar="N", min=1, help="Actions taken of a chunk; all when omitted.")
        ] = None,
        max_steps: StepLimit = None,
        checkpoint: Annotated[
            str | None, typer.Option(metavar="STEP|best|PATH", help="Of a run, in place of its export.")
        ] = None,
        tokenizer: Annotated[
            str | None, typer.Option(metavar="PATH", help="The StaMo tokenizer it sees through, where it moved.")
        ] = None,
        device: Annotated[
            str | None, typer.Option(metavar="cpu|cuda", help="Where it runs; the GPU where there is one.")
        ] = None,
        processes: ProcessesOption = None,
        videos: BothVideosOption = 1,
        baselines: Annotated[
            bool, typer.Option("--baselines", help="Random actions and the benchmark's expert in the same trials, too.")
        ] = False,
        shuffle_instructions: Annotated[
            bool, typer.Option("--shuffle-instructions", help="Tell every task what the next one is to do.")
        ] = False,
        num_slices: Annotated[int, typer.Option(min=1, help="Runs that share the trials, for a Slurm array.")] = 1,
        slice: Annotated[int, typer.Option(help="Which of these runs this is, from 0.")] = 0,
        out: OutOption = None,
    ) -> None:
        """Success rate of a policy in closed loop, from the benchmark's initial states and by its own success check.

        Started again after a kill it goes on, trial by trial; whichever slice ends last makes the whole table.

        Example: stamo eval rollout runs/policy_openvla_state --tasks libero_spatial --trials 20

        Example: stamo eval rollout runs/my_policy --tasks libero_10 --num-slices 8 --slice $SLURM_ARRAY_TASK_ID

        Example: stamo eval rollout weights/openvla-oft-libero-spatial --as oft-libero --tasks libero_spatial --out oft
        """
        from stamo_dist.evaluate.rollout import rollout as measure
        from stamo_dist.models.openvla.framing import Use

        measure(
            policy, benchmarks, checkpoint=checkpoint, tasks=split(tasks), benchmark=benchmark, trials=trials,
            cameras=split(cameras or []), size=size, actions=actions,
            use=Use(as_, orientation, crop, views, chunk, bounds), unnorm_key=unnorm_key, act_steps=act_steps,
            max_steps=max_steps, tokenizer=tokenizer, device=device, processes=processes, videos=videos,
            baselines=baselines, shuffle_instructions=shuffle_instructions, num_slices=num_slices, slice=slice, out=out,
        )  # fmt: skip

    @app.command()
    def during(
        run: RunArgument,
        step: Annotated[int, typer.Argument(metavar="STEP", help="Of a checkpoint that is still there.")],
    ) -> None:
        """Roll a policy's checkpoint out as `evaluate.rollout` in its recipe says: what a training does by itself.

        Trials that are there are not made again. The training tells the result at its next look or start.

        Example: stamo eval during runs/policy_openvla_state 4000
        """
        from stamo_dist.evaluate.saved_rollout import roll_out

        roll_out(run, step, benchmarks)


def check_rollout(recipe: Recipe, benchmarks: Benchmarks) -> None:
    """Refuse what the rollouts that a recipe asks for would refuse, where the simulator is here to ask.

    Raises:
        RecipeError: Unknown benchmark, task or camera, or more trials than there are initial states.
    """
    from stamo_dist.evaluate.simulators import Setting

    wanted = recipe.evaluate.rollout
    benchmark = (wanted.benchmark or _format(recipe)) if wanted is not None else None
    if wanted is None or benchmark is None or not benchmarks.checkable(benchmark):
        return
    try:
        cameras = tuple(wanted.cameras) or (benchmarks.default_camera(benchmark),)
        benchmarks.resolve(benchmark, wanted.tasks, Setting(wanted.size or 256, cameras, wanted.actions))
    except DataError as e:
        joints = (("." if re.match("(cameras|tasks|size): ", line) else ": ", line) for line in str(e).splitlines())
        raise RecipeError([f"evaluate.rollout{joint}{line}" for joint, line in joints]) from None
    most = benchmarks.trials(benchmark)
    if most is not None and wanted.trials > most:
        raise RecipeError([f"evaluate.rollout.trials: {benchmark} has {most} initial states of each task"])


def _format(recipe: Recipe) -> str | None:
    """Of the data with actions, where it is one and at hand: what a policy is rolled out in unless it is said."""
    from stamo_dist.data.schema import read_manifest

    found = set()
    for source in recipe.data.used.values():
        if source.actions:
            try:
                found.add(read_manifest(Path(source.paths[0]).expanduser()).source_format)
            except DataError:
                return None
    return found.pop() if len(found) == 1 else None
