"""`stamo chaos`: whether a training on this machine survives anything."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from stamo_dist.cli.options import Overrides
from stamo_dist.command_options import with_options
from stamo_dist.errors import RunError

if TYPE_CHECKING:
    from stamo_dist.chaos.harness import Plan
    from stamo_dist.chaos.job_harness import Site

_SIZES = "1,2"
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe of a short training.")]


@dataclass(frozen=True)
class ChaosOptions:
    """Train a recipe under random faults, and compare every step with a training that was left alone.

    Ranks, loader workers, the launcher or all at once are killed, asked to stop or stopped, while they start, train,
    save and leave; checkpoints are damaged; the number of processes changes between starts; a conversion is killed.
    Samples must be the same in every step, losses too: to the bit those of a training that nobody disturbs and that
    does each step on as many processes. Exit code 1 when they are not.

    With --slurm every training is a job, submitted as `stamo submit` does it: it is queued again, its ranks are
    signalled and killed, and what else --operator offers is done to its cluster. It has to finish by itself.

    Example: stamo chaos recipes/tokenizer_demo.yaml --kills 20 --set train.steps=300

    Example: stamo chaos recipes/tokenizer_demo.yaml --slurm preemptible --kills 20 --set train.steps=3000
    """

    recipe: RecipePath
    kills: Annotated[int, typer.Option(metavar="N", min=1, help="Faults in all.")] = 20
    seed: Annotated[int, typer.Option(metavar="S", help="Draws the faults.")] = 0
    strategies: Annotated[
        str | None, typer.Option(metavar="A,B", help="Strategies to try; the recipe's when omitted.")
    ] = None
    world_sizes: Annotated[
        str, typer.Option(metavar="N,M", help="Numbers of processes on this machine, changed between starts.")
    ] = _SIZES
    slurm: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE", help="Train in jobs of Slurm with this profile, as `stamo submit --cluster` takes it."
        ),
    ] = None
    operator: Annotated[
        str | None,
        typer.Option(metavar="PROGRAM", help="With --slurm: does to the cluster what only its operator can."),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to train; RUN_DIR-chaos when omitted. Results add up there."),
    ] = None
    set_: Overrides = field(default_factory=list)
    untouched: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Trainings left alone, each. Several show how far a device that is not deterministic may differ.",
        ),
    ] = 1
    convert: Annotated[bool, typer.Option(help="Some of the faults hit a conversion.")] = True
    warm: Annotated[
        bool, typer.Option("--warm", help="Fork every start off one process that has imported everything: quicker.")
    ] = False
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Without a sign of life for so long, a run counts as hung.")
    ] = 600.0

    def plan(self) -> Plan:
        """Raises: StamoError: The recipe cannot be read, or `world_sizes` are invalid."""
        from stamo_dist.chaos.harness import Plan
        from stamo_dist.recipe.load import load

        loaded = load(self.recipe, self.set_).recipe
        site = self.site()
        try:
            sizes = sorted({int(size) for size in self.world_sizes.split(",")})
        except ValueError:
            raise RunError(f"--world-sizes {self.world_sizes}: give numbers, e.g. 1,2") from None
        if sizes[0] < 1:
            raise RunError(f"--world-sizes {self.world_sizes}: a training has at least 1 process")
        return Plan(
            recipe=self.recipe,
            overrides=self.set_,
            kills=self.kills,
            seed=self.seed,
            strategies=self.strategies.split(",") if self.strategies else [loaded.strategy.name],
            sizes=[site.processes()] if site else sizes,
            out=(self.out or Path(f"{loaded.run_dir}-chaos")).absolute(),
            untouched=self.untouched,
            convert=self.convert and site is None,
            patience=self.patience,
        )

    def site(self) -> Site | None:
        """Where its jobs run; None if it trains on this machine."""
        from stamo_dist.chaos.job_faults import Nobody, Program
        from stamo_dist.chaos.job_harness import Site

        if self.slurm is None:
            if self.operator is not None:
                raise RunError("--operator: is of a cluster; name its profile with --slurm")
            return None
        if self.warm or self.world_sizes != _SIZES:
            raise RunError("--slurm: its profile says how many processes train, and how; omit --world-sizes and --warm")
        return Site(self.slurm, Program(self.operator) if self.operator else Nobody())


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """A second Ctrl-C must not interrupt the ending of processes."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


@with_options(ChaosOptions)
def chaos(_: typer.Context, asked: ChaosOptions) -> None:
    import psutil
    from rich.console import Console

    from stamo_dist.chaos import results
    from stamo_dist.chaos.harness import Harness
    from stamo_dist.chaos.job_harness import JobHarness
    from stamo_dist.chaos.starts import ForkServer, Spawner

    plan, site = asked.plan(), asked.site()
    os.environ["XDG_STATE_HOME"] = str(plan.out / "state")  # its trainings are none of the user's runs
    console = Console(width=None if sys.stdout.isatty() else 120)
    before = len(results.read(plan.out))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt_once)

    def say(text: str) -> None:
        console.print(text, markup=False)

    starter = ForkServer() if asked.warm and site is None else Spawner()
    harness = Harness(plan, starter, say) if site is None else JobHarness(plan, site, say)
    interrupted = False
    try:
        harness.run()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for process in psutil.Process().children(recursive=True):  # all are its starts, recorded by it or not yet
            with suppress(psutil.NoSuchProcess):
                process.kill()
        starter.close()
    found = results.read(plan.out)
    results.show(found, console)
    console.print(f"results: {plan.out / results.FILE}", soft_wrap=True)
    if interrupted:
        sys.exit(130)
    sys.exit(0 if all(result.good for result in found[before:]) else 1)
