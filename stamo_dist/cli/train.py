"""`stamo train | encode`. Torch is imported only inside."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.simulators.catalogue import InstalledBenchmarks
from stamo_dist.cli.options import Branch, Overrides, Processes, RecipePath
from stamo_dist.errors import RecipeError, StamoError
from stamo_dist.evaluate.rollout_check import check_rollout
from stamo_dist.faults.ended import says_if_ended
from stamo_dist.words import counted

if TYPE_CHECKING:
    from stamo_dist.recipe.load import Loaded
    from stamo_dist.recipe.schema import Recipe
    from stamo_dist.training.evaluation import Evaluation


def train(
    recipe: RecipePath,
    nproc: Processes = 1,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|none|best|PATH", help="Go on from the newest whole one, none, the best, or that."),
    ] = "auto",
    branch: Branch = None,
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

    Example: stamo train recipes/tokenizer_sim.yaml --branch 20000
    """
    given = {"--allow-changed-data": allow_changed_data, "--allow-changed-model": allow_changed_model}
    allowed = frozenset(flag for flag, on in given.items() if on)
    launched = "RANK" in os.environ
    if branch is not None:
        if launched or resume != "auto":
            raise StamoError("--branch: begins a run of its own, on one machine; on a cluster: stamo submit --branch")
        set_ = _begin_branch(recipe, set_, branch)
    loaded = _as_launched(recipe, set_) if launched else _checked(recipe, set_, nproc)
    if not launched and nproc > 1:
        from stamo_dist.launch.local import launch_local

        sets = (x for s in set_ for x in ("--set", s))
        arguments = ["train", str(recipe), "--resume", resume, *sets, *sorted(allowed)]
        sys.exit(launch_local(arguments, nproc, Path(loaded.recipe.run_dir)))

    # Blocked until there is something to save; Ctrl-C still works.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    gc.disable()  # imports make a million objects that stay: collecting them takes as long as importing torch
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


def _begin_branch(recipe: Path, overrides: list[str], step: int) -> list[str]:
    from stamo_dist.checkpoint.branch import branch

    return branch(recipe, overrides, step)


def _as_launched(recipe: Path, overrides: list[str]) -> Loaded:
    from stamo_dist.recipe.load import load

    return load(recipe, overrides, world_size=int(os.environ["WORLD_SIZE"]))


def _checked(recipe: Path, overrides: list[str], processes: int) -> Loaded:
    """The recipe, once its data and weights have been looked at; prints what may not be meant.

    A disk that hangs does not hold this process: after train.setup_timeout it is left to the run and its watchdog.

    Raises:
        RecipeError: What training would refuse.
    """
    from stamo_dist.launch.recipe_checks import Looked, Scope, refuse
    from stamo_dist.recipe.load import load_draft

    draft = load_draft(recipe, overrides)
    if draft.loaded is None:
        raise RecipeError(draft.problems)
    found: list[tuple[Loaded, Looked] | Exception] = []

    def look() -> None:
        try:
            found.append(refuse(draft, Scope(world_size=processes, asked="--nproc")))
        except Exception as e:
            found.append(e)

    thread, limit = threading.Thread(target=look, daemon=True), draft.loaded.recipe.train.setup_timeout
    thread.start()
    thread.join(limit)
    if not found:
        if draft.problems:
            raise RecipeError(draft.problems)
        print(f"note: data and weights were not looked at: no answer in {limit:g} s (train.setup_timeout)", flush=True)
        return draft.loaded
    if isinstance(found[0], Exception):
        raise found[0]
    loaded, looked = found[0]
    downloads = [f"{field}: {what}, and is downloaded now" for field, what, _ in looked.to_download]
    print(*(f"note: {note}\n" for note in [*looked.notes, *downloads]), sep="", end="", flush=True)
    return loaded


def encode(
    recipe: RecipePath,
    nproc: Processes = 1,
    arithmetic: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|tf32|bf16", help="Of the model; when omitted fp32 for states, and bf16 for latents on a GPU."
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model first, which takes a minute.")] = False,
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Write what frozen models make of every frame beside the shards: once, instead of in every step.

    Of a tokenizer's recipe the VAE's latents, for `data.latents: cached`; of a policy's the tokenizer's states, for
    `policy.targets: cached`. May be started again, and under torchrun or Slurm on many processes: whole shards are
    skipped. Says how far tf32 and bf16 are from fp32.

    Example: stamo encode recipes/policy_openvla_motion.yaml --nproc 8 --arithmetic bf16 --compile
    """
    if nproc > 1 and "RANK" not in os.environ:
        from stamo_dist.launch.local import launch_local
        from stamo_dist.recipe.load import load

        options = [*(("--arithmetic", arithmetic) if arithmetic else ()), *(("--compile",) if compiled else ())]
        arguments = ["encode", str(recipe), *options, *(x for s in set_ for x in ("--set", s))]
        sys.exit(launch_local(arguments, nproc, Path(load(recipe, set_).recipe.run_dir)))
    # A launcher blocks these until a rank can handle them; here they end the process: partial shards are ignored.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    if "RANK" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with says_if_ended("shards that are whole are kept"):
        from stamo_dist.recipe.load import load

        loaded = load(recipe, set_).recipe  # before the slow imports

        from stamo_dist.distributed.rank import world_from_environment
        from stamo_dist.encode.run import encode as run

        done = run(loaded, world_from_environment(), arithmetic, compiled=compiled)
    error = "" if done.error is None else f", {done.error:.2g} of a row's size from fp32"
    how = f" in {done.arithmetic}{error}" if done.shards else ": what is asked for is there already"
    print(f"encoded {counted(done.shards, 'shard')}{how}")


def _evaluation(recipe: Recipe) -> Evaluation:
    """The evaluation during training that the recipe asks for."""
    run = Path(recipe.run_dir)
    if recipe.evaluate.rollout is None:
        from stamo_dist.evaluate.during import BlockingEvaluation

        return BlockingEvaluation(run, recipe)
    from stamo_dist.evaluate.background import BackgroundRollouts
    from stamo_dist.launch.aside import launcher
    from stamo_dist.run.folder import RunFolder

    wanted = recipe.evaluate.rollout
    check_rollout(recipe, InstalledBenchmarks())
    return BackgroundRollouts(RunFolder(run), recipe, launcher(run, wanted.where, wanted.cluster))
