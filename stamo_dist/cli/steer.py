"""Ending a run, and resubmitting one that ended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stamo_dist.errors import RunError
from stamo_dist.launch import slurm, submit, supervise
from stamo_dist.launch.ends import newest_step
from stamo_dist.launch.profile import ClusterProfile
from stamo_dist.launch.record import Event, recipe_file, record
from stamo_dist.launch.status import Run, collect
from stamo_dist.launch.submit import JobOrder


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
            owner = supervise.supervisor(path)
            way = f"; `kill {owner.pid}` on {owner.node} has it save and end" if owner else ""
            raise RunError(f"{path}: cannot be written ({e.strerror}), so it goes on{way}") from e
        return f"{run.name}: it saves, leaves and is not started again"
    if run.state.word == "unknown" and (found := slurm.jobs([launch.job])) and not any(job.active for job in found):
        return f"{run.name}: nothing to cancel, Slurm says that job {launch.job} is {found[0].state.lower()}"
    slurm.cancel(launch.job)
    note = ""
    try:  # after scancel: if that is refused, nothing changes
        record(path, Event("cancelled", job=launch.job, step=newest_step(path)))
    except OSError as e:
        note = f" ({path} cannot be written: {e.strerror}; only Slurm knows of it)"
    return f"{run.name}: job {launch.job} cancelled{note}"


def resume(path: Path, *, nodes: int | None = None, time: str | None = None) -> str:
    """Submit the run again, with the code and the recipe it was submitted with. Returns a description of what was done.

    `nodes`, `time`: override the profile's.

    Raises:
        StamoError: It runs, has finished, was never submitted, or is refused.
    """
    run = _look(path)
    launch = run.launch
    if run.state.live:
        raise RunError(f"{path}: is {run.state.word} already; `stamo cancel {path}` ends it")
    if run.state.word == "finished":
        raise RunError(f"{path}: has finished; to train on, submit the recipe with more train.steps")
    if launch is None or launch.snapshot is None:
        recipe = path / "resolved.yaml"
        raise RunError(
            f"{path}: was not submitted; `stamo train {recipe}` goes on here, "
            f"`stamo submit {recipe} --cluster PROFILE` on a cluster"
        )
    if launch.kind != "run":
        raise RunError(f"{path}: is part of a pipeline or sweep; submit that again: what is done is skipped")
    order = JobOrder(launch, ClusterProfile.model_validate(launch.profile))
    if nodes or time:
        order = submit.plan(recipe_file(launch.snapshot), launch.cluster, resources=submit.Resources(nodes, time=time))
        kept = replace(order.launch, recipe=launch.recipe, overrides=launch.overrides, snapshot=launch.snapshot)
        order = replace(order, launch=kept)
    launch = submit.submit(order)
    return f"{submit.describe(order)}\njob {launch.job}: goes on {_from(run)}"


def _look(path: Path) -> Run:
    return collect([path])[0]


def _from(run: Run) -> str:
    return f"after step {run.progress.checkpoint}" if run.progress.checkpoint else "from the start: nothing was saved"
