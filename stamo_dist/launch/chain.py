"""Several runs of one command: a pipeline's stages, each job after the ones it needs; a sweep's members.

`--sweep optimizer.lr=1e-4,3e-4 --sweep seed=0,1` is the grid of all combinations. The members are ordinary runs below
the recipe's run folder, `RUN_DIR/sweep/lr=0.0001,seed=0`; they only share that they were submitted as one array.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Literal

from stamo_dist.errors import RecipeError, RunError
from stamo_dist.launch import recipe_checks, submit
from stamo_dist.launch.pipeline import Pipeline, Work
from stamo_dist.launch.profile import ClusterProfile, load_profile
from stamo_dist.launch.record import PIPELINE, SWEEP, Launch, finished
from stamo_dist.launch.record import read as read_launch
from stamo_dist.launch.run_progress import read_progress
from stamo_dist.launch.sbatch import JobOrder
from stamo_dist.launch.submit import SNAPSHOT, Resources
from stamo_dist.pretrained.pin import pin
from stamo_dist.pretrained.place import hub_id
from stamo_dist.recipe.lines import read_override, show_value
from stamo_dist.recipe.load import dump, load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, write_atomic

_PLAIN = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class Step:
    """One stage, and whether it has to be submitted."""

    work: Work
    state: Literal["done", "active", "todo"]
    job: str | None = None  # job id of an active stage

    @property
    def words(self) -> str:
        """The state as text."""
        return {"done": "done, skipped", "active": f"job {self.job} is queued or runs", "todo": "to do"}[self.state]


def look_at(works: Sequence[Work]) -> list[Step]:
    """The stages of a pipeline: done, active, or to be submitted.

    A stage is done when it finished, would do the same again, and none of the stages before it finished later.
    """
    steps: dict[str, Step] = {}
    ended: dict[str, float] = {}
    for work in works:
        job = submit.active(work.run_dir)
        when = _finished(work)
        if job is not None:
            steps[work.name] = Step(work, "active", job)
        elif when is not None and all(steps[b].state == "done" and ended[b] <= when for b in work.after):
            steps[work.name], ended[work.name] = Step(work, "done"), when
        else:
            steps[work.name] = Step(work, "todo")
    return list(steps.values())


def stage_orders(
    pipeline: Pipeline, steps: Sequence[Step], cluster: str, changes: Sequence[str] = ()
) -> list[JobOrder]:
    """One order per stage to submit. `changes`: profile fields for all stages, `field=value` each.

    Raises:
        StamoError: A profile is wrong or a stage could not run there. Data and weights that earlier stages create are
            not checked.
    """
    by_name = {step.work.name: step for step in steps}
    found = []
    for step in steps:
        if step.state != "todo":
            continue
        work, stage = step.work, step.work.stage
        where = stage.cluster or cluster
        profile = load_profile(where, changes)[1]
        slices = None if profile.backend == "local" else stage.slices  # the local converter uses all cores
        name, command = f"{pipeline.name}.{work.name}", _command(work, slices)
        launch = Launch(name, str(work.run_dir), stage.train or "", stage.overrides, "stage", command)
        around, after = Path(pipeline.run_dir).absolute(), [str(by_name[before].work.run_dir) for before in work.after]
        launch = replace(launch, after=after, tasks=slices or 1, pipeline=str(around), digest=digest(work))
        ready = all(by_name[before].state == "done" for before in work.after)
        wanted = [*changes, *_shape(work, profile)]
        wanted += [f"{field}={show_value(value, limit=1 << 16)}" for field, value in stage.resources.items()]
        found.append(submit.ask(launch, work.loaded, where, wanted, every_gpu=work.every_gpu, ready=ready))
    if len({order.profile.backend for order in found}) > 1:
        raise RunError("some stages are for this machine and some for a cluster; give all of them one kind of profile")
    return found


def send(pipeline: Pipeline, path: Path, steps: Sequence[Step], found: Sequence[JobOrder]) -> list[Launch]:
    """Queue the orders, each after the jobs of the stages it needs, and record the pipeline.

    Raises:
        StamoError: The cluster refuses one, and the earlier ones are cancelled; or a folder cannot be written.
    """
    folder = Path(pipeline.run_dir).absolute()
    RunFolder(folder).check()
    jobs = {str(step.work.run_dir): step.job for step in steps if step.job is not None}
    launches = submit.submit_all(found, jobs)
    stages = {step.work.name: str(step.work.run_dir) for step in steps}
    record = {"name": pipeline.name, "file": str(path), "stages": stages}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / PIPELINE, json.dumps(record, indent=1) + "\n")
    return launches


def digest(work: Work) -> str:
    """Digest of a stage's command and of the recipe that it reads."""
    recipe = dump(work.loaded.recipe) if work.loaded else ""
    return hashlib.sha256(json.dumps([work.words, recipe]).encode()).hexdigest()


def _finished(work: Work) -> float | None:
    """When the stage finished with its current digest, None if it did not."""
    if work.trains:
        assert work.loaded is not None, "a stage that trains has a recipe"
        resolved = work.run_dir / "resolved.yaml"
        try:
            ran = load(resolved).recipe
            same = _lasting(ran) == _lasting(_at_the_commits_of(work.loaded.recipe, ran))
        except RecipeError:
            same = False
        if not same or not read_progress(work.run_dir).finished:
            return None
        return (work.run_dir / "model").stat().st_mtime
    try:
        launch = read_launch(work.run_dir)
    except RunError:
        return None
    when = finished(launch)
    if when is None or launch.digest != digest(work) or (work.makes and not work.makes.exists()):
        return None
    return datetime.fromisoformat(when).timestamp()


def _at_the_commits_of(recipe: Recipe, ran: Recipe) -> Recipe:
    """`recipe` with hub ids pinned to the commits that its run recorded, unless it names revisions itself."""
    commits = {}
    for name in ("model.encoder", "model.decoder", "model.vae", "policy"):
        asked, found = (attrgetter(f"{name}.weights")(r) for r in (recipe, ran))
        if asked and found and hub_id(asked) == (asked, None):
            commits[f"{name}.weights"] = found
    return pin(recipe, commits)


def _lasting(recipe: Recipe) -> Recipe:
    """The recipe without values that the cluster sets."""
    checkpoint = recipe.train.checkpoint.model_copy(update={"grace_seconds": None})
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpoint": checkpoint})})


def _command(work: Work, slices: int | None) -> list[str]:
    """The command with the snapshot's recipe in place of the checkout's, which may change while the job waits."""
    if work.loaded is not None:
        return [work.words[0], f"{SNAPSHOT}/recipe.yaml"]
    return [*work.words, *(("--num-slices", str(slices), "--slice", "{task}") if slices else ())]


def _shape(work: Work, profile: ClusterProfile) -> list[str]:
    """Profile changes for a one-process command: `data` gets all CPUs and memory of a node, `eval` one GPU's part."""
    if work.every_gpu:
        return []
    gpus = min(1, profile.gpus_per_node) if work.words[0] == "eval" else 0
    share = profile.processes if work.words[0] == "data" else 1
    nothing = [] if gpus else ["gpu_type=null", "cpu_bind=null"]
    nothing += [] if work.words[0] == "data" else ["memory=null", "exclusive=false"]
    one_node = ["nodes=1", "min_nodes=null", "max_nodes=null", "segment=null", "processes_per_node=null"]
    return [*one_node, *nothing, f"gpus_per_node={gpus}", f"cpus_per_gpu={profile.cpus_per_gpu * share}"]


@dataclass(frozen=True)
class Point:
    """One member of a sweep."""

    values: dict[str, str]  # field → value, as YAML

    @property
    def overrides(self) -> list[str]:
        return [f"{field}={value}" for field, value in self.values.items()]

    def as_given(self, problem: str) -> str:
        """A problem of a value named by the option that gave it."""
        given = any(problem.startswith(f"--set {field}:") for field in self.values)
        return f"--sweep{problem.removeprefix('--set')}" if given else problem

    @property
    def name(self) -> str:
        """A folder name with the values; fields by their last part if that is unique."""
        lasts = [field.rpartition(".")[2] for field in self.values]
        short = {f: last if lasts.count(last) == 1 else f for f, last in zip(self.values, lasts, strict=True)}
        return ",".join(f"{short[field]}={_PLAIN.sub('-', value)}" for field, value in self.values.items())


def expand_sweep(sweeps: Sequence[str]) -> list[Point]:
    """All combinations of the values of the `FIELD=VALUE,VALUE…` given, the last field changing fastest.

    Raises:
        RecipeError: One cannot be read, or names a field twice, or gives a value twice.
    """
    axes: dict[str, list[str]] = {}
    problems = []
    for sweep in sweeps:
        field, equals, text = (part.strip() for part in sweep.partition("="))
        values = _values(field, text) if equals and text else None
        if values is None:
            problems.append(f"--sweep {sweep}: write FIELD=VALUE,VALUE, for example --sweep optimizer.lr=1e-4,3e-4")
        elif field in axes:
            problems.append(f"--sweep {field}: given twice; put all its values into one")
        elif len(set(values)) < len(values):
            problems.append(f"--sweep {field}: a value is given twice")
        else:
            axes[field] = values
    points = [Point(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    if not problems and len({p.name for p in points}) < len(points):
        problems.append("--sweep: two of the runs would have the same folder name")
    if problems:
        raise RecipeError(problems)
    return points


def sweep_orders(
    recipe: str | Path, cluster: str, sweeps: Sequence[str], overrides: Sequence[str], resources: Resources
) -> tuple[list[JobOrder], str]:
    """(one array of all runs of the sweep, or a list of orders for this machine; their parent folder).

    Raises:
        StamoError: The sweep, one of its recipes or the profile is wrong.
    """
    points = expand_sweep(sweeps)
    base = recipe_checks.read(recipe, overrides).recipe
    folder = Path(base.run_dir) / SWEEP
    found = []
    for point in points:
        own = {"run_dir": str(folder / point.name), "name": f"{base.name}-{point.name}"}
        set_ = [f"{field}={show_value(value, limit=1 << 16)}" for field, value in own.items()]
        given = [*overrides, *point.overrides, *set_]
        try:
            found.append(submit.plan(recipe, cluster, overrides=given, resources=resources))
        except RecipeError as e:
            raise RecipeError([point.as_given(problem) for problem in e.problems]) from e
    if found[0].profile.backend == "local":
        return found, str(folder)
    if any(order.launch.node_counts != found[0].launch.node_counts for order in found):
        raise RecipeError(["--sweep: the runs of an array have the same nodes, and these recipes need different ones"])
    return [replace(found[0], members=found)], str(folder)


def _values(field: str, text: str) -> list[str] | None:
    """The values, each as YAML; None if they cannot be parsed. Lists keep their brackets: `a=[1,2],[3,4]`."""
    layer = read_override(f"{field}=[{text}]")
    value: object = layer.value
    if layer.problems:
        return None
    for name in field.split("."):
        value = value[name] if isinstance(value, dict) else None
    return [show_value(v, limit=1 << 16) for v in value] if isinstance(value, list) and value else None
