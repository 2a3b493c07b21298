"""The `stamo` command. Torch is imported only inside the commands that need it."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.commands import app as data_app
from data_tools.simulators.catalogue import Benchmarks
from stamo_dist.chaos.commands import chaos
from stamo_dist.errors import RecipeError, RunError, StamoError
from stamo_dist.evaluate.commands import EvalTools
from stamo_dist.evaluate.commands import app as eval_app
from stamo_dist.evaluate.rollout_check import check_rollout
from stamo_dist.evaluate.use_options import (
    AsOption,
    BoundsOption,
    ChunkOption,
    CropOption,
    OrientationOption,
    ViewsOption,
)
from stamo_dist.launch import commands as launch_commands
from stamo_dist.launch import verbs
from stamo_dist.launch.doctor.commands import doctor, probe
from stamo_dist.plan.commands import plan
from stamo_dist.publish.commands import export
from stamo_dist.recipe.commands import app as recipe_app

if TYPE_CHECKING:
    from stamo_dist.recipe.schema import Recipe
    from stamo_dist.training.evaluation import Evaluation

app = typer.Typer(
    help="Pretrain robot state tokenizers and policies: mix data through recipes, train, resume, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")


@eval_app.callback()
def _bring_tools(context: typer.Context) -> None:
    from stamo_dist.launch.local import launch_local

    context.obj = EvalTools(launch_local, Benchmarks())


@recipe_app.callback()
def _bring_advice(context: typer.Context) -> None:
    def look(recipe: Recipe) -> list[str]:
        from stamo_dist.data.advice import advice

        check_rollout(recipe, Benchmarks())
        return advice(recipe)

    context.obj = look


app.add_typer(eval_app, name="eval")
app.add_typer(recipe_app, name="recipe")
app.command()(launch_commands.submit)
for verb in verbs.COMMANDS:
    app.command()(verb)
app.command()(doctor)
app.command("doctor-probe", hidden=True)(probe)
app.command()(chaos)
app.command()(plan)
app.command()(export)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/tokenizer_demo.yaml.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe; may be repeated.")
]
Processes = Annotated[int, typer.Option("--nproc", min=1, help="Processes to start on this machine.")]


@app.command()
def train(
    recipe: RecipePath,
    nproc: Processes = 1,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|none|best|PATH", help="Go on from the newest whole one, none, the best, or that."),
    ] = "auto",
    set_: Overrides = [],  # noqa: B006 (typer reads the default)
    allow_changed_data: Annotated[
        bool, typer.Option("--allow-changed-data", help="Resume although the mixture is not the one trained on so far.")
    ] = False,
    allow_changed_model: Annotated[
        bool, typer.Option("--allow-changed-model", help="Resume although the model is not the one trained so far.")
    ] = False,
) -> None:
    """Train a recipe, or go on where it stopped.

    Starts its processes itself; under torchrun or Slurm each process takes its rank from the environment.

    Example: stamo train recipes/tokenizer_demo.yaml --nproc 2 --set train.steps=500
    """
    from stamo_dist.recipe.load import load

    given = {"--allow-changed-data": allow_changed_data, "--allow-changed-model": allow_changed_model}
    allowed = frozenset(flag for flag, on in given.items() if on)
    launched = "RANK" in os.environ
    loaded = load(recipe, set_, world_size=int(os.environ["WORLD_SIZE"]) if launched else nproc)
    if not launched and nproc > 1:
        from stamo_dist.launch.local import launch_local

        arguments = ["train", str(recipe), "--resume", resume, *(x for s in set_ for x in ("--set", s))]
        arguments += sorted(allowed)
        sys.exit(launch_local(arguments, nproc, Path(loaded.recipe.run_dir)))

    # They wait until there is something to save; Ctrl-C works meanwhile.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    gc.disable()  # the million objects that imports make are all kept: looking through them takes as long as torch
    from stamo_dist.distributed.collectives import leave, run_rank
    from stamo_dist.distributed.rank import world_from_environment

    world = world_from_environment()

    def body() -> int:
        from stamo_dist.train import train as run

        evaluation = _evaluation(loaded.recipe) if loaded.recipe.evaluate.every and world.is_main else None
        gc.freeze()
        gc.enable()
        return run(loaded, world, resume=resume, allowed=allowed, evaluation=evaluation)

    leave(run_rank(world, body))


def _evaluation(recipe: Recipe) -> Evaluation:
    """What measures while it trains."""
    run = Path(recipe.run_dir)
    if recipe.evaluate.rollout is None:
        from stamo_dist.evaluate.during import BlockingEvaluation

        return BlockingEvaluation(run, recipe)
    from stamo_dist.evaluate.background import BackgroundRollouts
    from stamo_dist.launch.aside import launcher
    from stamo_dist.run.folder import RunFolder

    wanted = recipe.evaluate.rollout
    check_rollout(recipe, Benchmarks())
    return BackgroundRollouts(RunFolder(run), recipe, launcher(run, wanted.where, wanted.cluster))


@app.command()
def encode(recipe: RecipePath, nproc: Processes = 1, set_: Overrides = []) -> None:  # noqa: B006
    """Write what frozen models make of every frame beside the shards: once, instead of in every step.

    Of a tokenizer's recipe the VAE's latents, for `data.latents: cached`; of a policy's the tokenizer's states, for
    `policy.targets: cached`. May be started again, and under torchrun or Slurm on many processes: whole shards are
    skipped.

    Example: stamo encode recipes/policy_openvla_motion.yaml --nproc 8
    """
    if nproc > 1 and "RANK" not in os.environ:
        from stamo_dist.launch.local import launch_local
        from stamo_dist.recipe.load import load

        arguments = ["encode", str(recipe), *(x for s in set_ for x in ("--set", s))]
        sys.exit(launch_local(arguments, nproc, Path(load(recipe, set_).recipe.run_dir)))
    # A launcher blocks them until a rank can act on them; here they end it, and no half-written shard counts.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from stamo_dist.distributed.rank import world_from_environment
    from stamo_dist.encode import encode as run
    from stamo_dist.recipe.load import load

    loaded = load(recipe, set_).recipe
    print(f"encoded {run(loaded, world_from_environment())} shards")


@app.command()
def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN|EXPORT", help="A policy's run folder, or a folder with weights.")],
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Where the policy's StaMo tokenizer lies; where it was in training when omitted."),
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Source whose units the actions have, if a request names none.")
    ] = None,
    as_: AsOption = None,
    orientation: OrientationOption = None,
    crop: CropOption = None,
    views: ViewsOption = None,
    chunk: ChunkOption = None,
    bounds: BoundsOption = None,
    frames: Annotated[
        str,
        typer.Option(
            metavar="as-trained|upright",
            help="How clients send frames: turned as the policy was trained, as the official clients do, or upright.",
        ),
    ] = "as-trained",
) -> None:
    """Answer observations with actions over HTTP, as clients of OpenVLA and OpenVLA-OFT speak. There is no login.

    Needs `pip install "stamo-dist[serve]"`.

    Example: stamo serve runs/policy_oft_state --port 8777

    Example: stamo serve moojink/openvla-7b-oft-finetuned-libero-spatial --as oft-libero
    """
    from importlib.util import find_spec

    if missing := [name for name in ("json_numpy", "starlette", "uvicorn") if find_spec(name) is None]:
        raise RunError(f"serving needs the packages {', '.join(missing)}; pip install 'stamo-dist[serve]'")
    from stamo_dist.models.openvla.framing import Use
    from stamo_dist.serve import serve as answer

    answer(
        run, host=host, port=port, device=device, tokenizer=tokenizer, unnorm_key=unnorm_key, frames=frames,
        use=Use(as_, orientation, crop, views, chunk, bounds),
    )  # fmt: skip


@app.command()
def mix(
    recipe: RecipePath,
    set_: Overrides = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where to draw it; RUN_DIR/mixture.png when omitted.")
    ] = None,
) -> None:
    """Show what the mixture really is: requested and realised shares, unique samples, epochs; as a table and a picture.

    Of a policy's recipe also how many samples have an action loss, and how many a world loss, and which sources give no
    actions; it fails (exit code 2) where none does.

    Example: stamo mix recipes/tokenizer_demo.yaml --set data.sources.libero.weight=3
    """
    from stamo_dist.data.instructions import episode_tables
    from stamo_dist.data.mixture import Mixture
    from stamo_dist.data.shares import report
    from stamo_dist.data.supervised import Supervision
    from stamo_dist.data.table import mixture_picture, mixture_table
    from stamo_dist.recipe.load import load

    loaded = load(recipe, set_).recipe
    mixture = Mixture(loaded.data, seed=loaded.seed, global_batch=loaded.train.global_batch)
    steps = loaded.train.steps
    mixture_table(report(mixture, steps))
    problems: list[str] = []
    if loaded.stage == "policy":
        supervision = Supervision(loaded, episode_tables(mixture))
        print("\n".join(supervision.lines))
        problems = supervision.problems
    print(f"picture: {mixture_picture(mixture, steps, out or Path(loaded.run_dir) / 'mixture.png')}")
    if problems:
        raise RecipeError(problems)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, shown side by side.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; RUN/report.html of the first run when omitted.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: recipe, mixture, curves, evaluations, pictures.

    Example: stamo report demo/runs/tokenizer
    """
    from stamo_dist.report import write_report

    print(f"report: {write_report(runs, out or runs[0] / 'report.html')}")


def main() -> None:
    """Console entry: errors a user can act on are printed without a traceback, exit code 2."""
    try:
        app()
    except StamoError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
