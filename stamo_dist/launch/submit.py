"""Submitting a recipe with a profile, after checking that it can run."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from stamo_dist.errors import RecipeError, RunError
from stamo_dist.launch import checks, failing, slurm, supervise, supervisor
from stamo_dist.launch.ends import newest_step
from stamo_dist.launch.grace import too_short
from stamo_dist.launch.notify import unheard
from stamo_dist.launch.profile import (
    AS_PROFILED,
    LOCAL,
    ClusterProfile,
    ProfileError,
    Resources,
    load_profile,
    names,
)
from stamo_dist.launch.recipe_checks import Scope, look
from stamo_dist.launch.recipe_checks import read as read_recipe
from stamo_dist.launch.record import (
    Event,
    Launch,
    folder,
    main_log,
    read,
    record,
    take_snapshot,
)
from stamo_dist.launch.sbatch import JobOrder, Sbatch, no_snapshot
from stamo_dist.launch.step import step
from stamo_dist.launch.undo import nothing_left
from stamo_dist.recipe.load import Draft, Loaded
from stamo_dist.run.folder import RunFolder

SNAPSHOT = "{snapshot}"  # placeholder in a command for the folder of the snapshot


def default_cluster() -> str:
    """The default profile: this machine, unless it is a login node.

    Raises:
        ProfileError: It is a login node.
    """
    if slurm.available():
        raise ProfileError([f"--cluster: name one, there is Slurm here: {', '.join(names())}"])
    return LOCAL


def plan(
    recipe: str | Path, cluster: str, *, overrides: Sequence[str] = (), resources: Resources = AS_PROFILED
) -> JobOrder:
    """The job that submitting the recipe would request. Writes nothing.

    Raises:
        StamoError: Recipe or profile is wrong, or it could not run there.
    """
    loaded = read_recipe(recipe, overrides)
    run, command = str(Path(loaded.recipe.run_dir).absolute()), ["train", f"{SNAPSHOT}/recipe.yaml"]
    launch = Launch(loaded.recipe.name, run, str(recipe), list(overrides), command=command)
    return ask(launch, loaded, cluster, resources.changes())


def ask(
    launch: Launch,
    loaded: Loaded | None,
    cluster: str,
    changes: Sequence[str] = (),
    *,
    every_gpu: bool = True,
    ready: bool = True,
) -> JobOrder:
    """The job that a launch would request. Writes nothing.

    Args:
        launch: The launch; resources and cluster are filled in here.
        loaded: Its recipe.
        cluster, changes: The profile, and overrides of its fields.
        every_gpu: Run one process per GPU, otherwise one process.
        ready: Its data and weights must already exist.

    Raises:
        StamoError: The profile is wrong, or it could not run there.
    """
    name, profile = load_profile(cluster, changes)
    return ask_of(profile, replace(launch, cluster=name), loaded, every_gpu=every_gpu, ready=ready)


def ask_of(
    profile: ClusterProfile, launch: Launch, loaded: Loaded | None, *, every_gpu: bool = True, ready: bool = True
) -> JobOrder:
    """`ask` with a profile, which the launch names."""
    trains, run = launch.command[0] == "train", Path(launch.run_dir)
    counts, notes, problems = [1], list[str](), list[str]()
    if loaded is not None and trains:
        try:
            counts, notes = checks.node_counts(loaded, profile)
        except RecipeError as e:
            problems += e.problems
    elif every_gpu:
        least, most = profile.node_range(profile.nodes)
        counts = list(range(least, most + 1))
    given, processes = profile.model_dump(mode="json"), profile.processes if every_gpu else 1
    launch = replace(launch, profile=given, max_restarts=profile.max_restarts)
    launch = replace(launch, nodes=profile.nodes, node_counts=counts, processes_per_node=processes)
    order = JobOrder(launch, profile, loaded, notes=notes)
    if loaded is not None and ready:
        own_packages = profile.container is None and profile.python is None
        looked = look(Draft(loaded), Scope(profile.environment, trains=trains, packages=own_packages))
        problems += looked.problems
        notes += looked.notes
        for field, what, fix in looked.to_download:
            notes.append(f"{field}: {what}; nodes without network cannot get it: {fix}")
    if problems:
        raise RecipeError(problems)
    RunFolder(run).check()
    grace = float(profile.signal_delay)
    if profile.backend == "slurm":
        notes += checks.shell_and_container(launch, Sbatch(order).text())
    if profile.backend == "slurm" and slurm.available():
        grace = checks.cluster(profile, order.least)
        Sbatch(order).test()
        order = off_failing_nodes(order)
    notes += unheard(given)
    if loaded is not None and trains and profile.backend == "slurm":
        loaded = _with_grace(loaded, grace)
        order, often = replace(order, loaded=loaded), loaded.recipe.train.checkpoint
        warning = too_short(run, often.grace_seconds or 0.0, often.every, often.ephemeral_every)
        notes += [warning] if warning else []
    return order


def off_failing_nodes(order: JobOrder) -> JobOrder:
    """The order without the nodes on which several starts of the run failed lately, unless too few are left.

    Raises:
        SlurmAwayError: Slurm does not answer.
    """
    nodes = failing.failing_now(order.launch)
    if not nodes or order.profile.backend == "local":
        return order
    off = replace(order, avoids=list(nodes))
    try:
        Sbatch(off).test()
    except slurm.SlurmAwayError:
        raise
    except slurm.SlurmError as e:
        order.notes.append(failing.kept_on(nodes, str(e)))
        return order
    order.notes.append(failing.kept_off(nodes))
    return off


def _with_grace(loaded: Loaded, seconds: float) -> Loaded:
    """The recipe with the cluster's grace time, unless it sets one; the run warns if that is too short."""
    train = loaded.recipe.train
    if train.checkpoint.grace_seconds is not None:
        return loaded
    checkpoint = train.checkpoint.model_copy(update={"grace_seconds": seconds})
    recipe = loaded.recipe.model_copy(update={"train": train.model_copy(update={"checkpoint": checkpoint})})
    origin = {**loaded.provenance, "train.checkpoint.grace_seconds": "the profile"}
    return replace(loaded, recipe=recipe, resolved=recipe.model_dump(mode="json"), provenance=origin)


def describe(order: JobOrder) -> str:
    """The request in one line."""
    launch, profile = order.launch, order.profile
    if profile.backend == "local":
        many = _many(launch.nodes * launch.processes_per_node, "process")
        return f"{launch.name}: {many} on this machine → {launch.run_dir}"
    counts = launch.node_counts or [launch.nodes]
    nodes = f"{counts[0]}" if len(counts) == 1 else f"{min(counts)}–{max(counts)} ({', '.join(map(str, counts))})"
    what = f"{profile.gpus_per_node} {profile.gpu_type or 'GPU'}" if profile.gpus_per_node else "no GPU"
    partition = checks.partition_of(profile)
    where = f"partition {partition}" if partition else "the default partition"
    each = f"{_many(launch.processes_per_node, 'process')}, {what}, {_many(order.cpus, 'CPU')}"
    tasks = f"{order.tasks} tasks of " if order.tasks else ""
    return f"{launch.name}: {tasks}{nodes} × ({each}), {profile.time} on {where} of {launch.cluster} → {launch.run_dir}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "es" if what.endswith("s") else "s")


def script(order: JobOrder) -> str:
    """The exact batch script; on this machine, the command of each process."""
    launch = order.launch
    taken = launch.snapshot or no_snapshot(launch)
    command = [word.replace(SNAPSHOT, taken) for word in launch.command]
    launch = replace(launch, snapshot=taken, command=command)
    if order.profile.backend == "local":
        return shlex.join(supervise.command(launch))
    srun = step(launch, max(launch.node_counts or [launch.nodes]))
    return f"{Sbatch(order).text()}\n# It starts the processes with\n#   {shlex.join(srun)}\n"


def submit(order: JobOrder) -> Launch:
    """`submit_all` for one order."""
    return submit_all([order])[0]


def submit_all(orders: Sequence[JobOrder], jobs: Mapping[str, str] | None = None) -> list[Launch]:
    """Take the snapshots, queue the jobs and record them. Returns the launches with their job ids.

    `jobs`: run folder → job id of earlier submissions on which orders depend.

    Raises:
        StamoError: A run is queued or running, also by hand, a folder cannot be written, or the cluster refuses; all
            changes are undone.
    """
    asked = [m.launch for order in orders for m in order.members or [order]]
    runs = [launch.run_dir for launch in asked]
    for launch in asked:
        run = launch.run_dir
        if running := active(run):
            raise RunError(f"{run}: job {running} is queued or runs; `stamo cancel {run}` ends it")
        if launch.command[0] == "train":
            checks.vacant(Path(run))
    with ExitStack() as stack:
        ready = [_prepared(order, stack) for order in orders]
        launches = [m.launch for order in ready for m in order.members or [order]]
        if all(order.profile.backend == "local" for order in ready):
            job = supervise.start(runs)
            for launch in launches:
                launch.job_ids.append(job)
        else:
            found = dict(jobs or {})
            for order in ready:
                after = [found[run] for run in order.launch.after if run in found]
                job = Sbatch(replace(order, after=after)).send()
                stack.push(partial(_take_back, job))
                found[order.launch.run_dir] = job
                order.launch.job_ids.append(f"{job}_0" if order.members else job)
                for i, member in enumerate(order.members[1:], 1):
                    member.launch.job_ids.append(f"{job}_{i}")
        for launch in launches:
            launch.write()
    return launches


def active(run: str | Path) -> str | None:
    """The queued or running job of the run, None without one."""
    try:
        ids = read(run).job_ids
    except RunError:
        return None
    if supervisor.busy(run):
        return ids[-1] if ids else "local"
    ids = [job for job in ids if not supervisor.is_local(job)]
    return next((job.id for job in slurm.jobs(ids) if job.active), None) if ids and slurm.available() else None


def _prepared(order: JobOrder, stack: ExitStack) -> JobOrder:
    """The order, or each of its members, with its snapshot taken and its record written; undone if `stack` fails."""
    if order.members:
        members = [_prepared(replace(member, members=[]), stack) for member in order.members]
        return replace(members[0], members=members)
    launch, run = order.launch, Path(order.launch.run_dir)
    before = read(run).job_ids if (folder(run) / "launch.json").is_file() else []
    stack.enter_context(nothing_left(run))
    taken = str(take_snapshot(run, order.loaded)) if launch.snapshot is None else launch.snapshot
    command = [word.replace(SNAPSHOT, taken) for word in launch.command]
    order = replace(order, launch=replace(launch, snapshot=taken, command=command, job_ids=list(before)))
    main_log(run).parent.mkdir(parents=True, exist_ok=True)
    record(run, Event("submitted", step=newest_step(run), avoids=order.avoids))
    order.launch.write()  # written before queueing: the job may start before sbatch returns
    return order


def _take_back(job: str, kind: type[BaseException] | None, *_: object) -> None:
    if kind is not None:
        with contextlib.suppress(slurm.SlurmError):
            slurm.cancel(job)
