"""Ending a run, and resubmitting one that ended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stamo_dist.errors import RunError
from stamo_dist.launch import recipe_checks, slurm, submit, supervise, supervisor
from stamo_dist.launch.again import command_by_hand
from stamo_dist.launch.ends import newest_step
from stamo_dist.launch.profile import known_profile
from stamo_dist.launch.record import Event, recipe_file, record
from stamo_dist.launch.sbatch import JobOrder
from stamo_dist.launch.status import Run, collect


def cancel(path: Path) -> str:
    """End the run: it saves if it runs, and is not started again. Returns a description of what was done.

    Raises:
        StamoError: It was not submitted, or the process in charge cannot be reached; then nothing has changed.
    """
    run = _look(path)
    launch = run.launch
    if launch is None:
        owner = run.progress.owner
        if run.state.live and owner is not None:
            raise RunError(f"{path}: was started by hand; `kill {owner.pid}` on {owner.node} has it save and leave")
        raise RunError(f"{path}: was not submitted, and nobody runs it")
    if not run.state.live:
        return f"{run.name}: nothing to cancel, it is {run.state.word}"
    if launch.job is None or launch.job.startswith("local-"):
        try:
            supervise.cancel(path)
        except OSError as e:
            owner = supervisor.of(path)
            way = f"; `kill {owner.pid}` on {owner.node} has it save and end" if owner else ""
            raise RunError(f"{path}: cannot be written ({e.strerror}), so it goes on{way}") from e
        return f"{run.name}: it saves, leaves and is not started again"
    return f"{run.name}: {_scancel(path, launch.job, [run.job] if run.job else slurm.jobs([launch.job]))}"


def _scancel(path: Path, job: str, known: Sequence[slurm.SlurmJob]) -> str:
    """End the job and record that; `known`: what Slurm says of it, as scancel also takes jobs that are over."""
    if not any(found.active for found in known):
        what = f"is {known[0].state.lower()}" if known else "is none that it knows"
        return f"nothing to cancel, Slurm says that job {job} {what}"
    slurm.cancel(job)
    try:  # after scancel: if that is refused, nothing changes
        record(path, Event("cancelled", job=job, step=newest_step(path)))
    except OSError as e:
        if any(found.state == "COMPLETING" for found in known):  # scancel has no effect then, the record has
            raise RunError(f"{path}: cannot be written ({e.strerror}), and Slurm ends its job by itself") from e
        return f"job {job} cancelled ({path} cannot be written: {e.strerror}; only Slurm knows of it)"
    return f"job {job} cancelled"


def resume(path: Path, *, nodes: int | None = None, time: str | None = None) -> str:
    """Submit the run again, with the code, the recipe and the profile it was submitted with, from the same folder.

    Returns a description of what was done; this process is in that folder then.

    `nodes`, `time`: override the profile's.

    Raises:
        StamoError: It runs, has finished, was never submitted, or is refused.
    """
    run = _look(path)
    launch = run.launch
    if run.state.live:
        raise RunError(f"{path}: is {run.state.word} already; `stamo cancel {path}` ends it")
    if run.job is not None and run.job.state == "COMPLETING":
        raise RunError(f"{path}: is {run.state.word}, and its job {run.job.id} leaves its nodes; ask again when it has")
    if run.state.word == "finished":
        raise RunError(f"{path}: has finished; to train on, submit the recipe with more train.steps")
    if launch is None or launch.snapshot is None:
        recipe = path / "resolved.yaml"
        raise RunError(
            f"{path}: was not submitted; `{command_by_hand(path)}` goes on here, "
            f"`stamo submit {recipe} --cluster PROFILE` on a cluster"
        )
    if launch.kind != "run":
        raise RunError(f"{path}: is part of a pipeline or sweep; submit that again: what is done is skipped")
    if Path(launch.cwd).is_dir():  # from where its recipe's relative paths lead
        os.chdir(launch.cwd)
    changes = submit.Resources(nodes, time=time).changes()
    profile = known_profile(launch.profile, changes, f"profile {launch.cluster}")
    if nodes or time:
        order = submit.ask_of(profile, launch, recipe_checks.read(recipe_file(launch.snapshot)))
    else:
        order = submit.off_failing_nodes(JobOrder(launch, profile))
    launch = submit.submit(order)
    notes = "".join(f"\n  {note}" for note in order.notes)
    return f"{submit.describe(order)}{notes}\njob {launch.job}: goes on {_from(run)}"


def _look(path: Path) -> Run:
    return collect([path])[0]


def _from(run: Run) -> str:
    return f"after step {run.progress.checkpoint}" if run.progress.checkpoint else "from the start: nothing was saved"
