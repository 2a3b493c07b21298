"""`slurm/*.yaml`: a cluster's resources and how a job requests them. Resources only, never a training knob."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stamo_dist import shipped
from stamo_dist.errors import StamoError
from stamo_dist.recipe.layers import did_you_mean, merge
from stamo_dist.recipe.schema import Section
from stamo_dist.recipe.validate import validate_as

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
FOLDER = "slurm"
LOCAL = "local"

_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
#: sbatch options that are set by profile fields or the launcher.
_OWN = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "time", "partition",
    "account", "qos", "constraint", "exclude", "signal", "output", "error", "open-mode", "requeue", "no-requeue",
    "array", "dependency", "chdir", "kill-on-invalid-dep",
)  # fmt: skip


class ProfileError(StamoError):
    """One or more problems in a profile, all at once."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{head} in the profile:", *(f"  - {p}" for p in problems)]))


class Container(Section):
    """A container for the processes, through srun's pyxis plugin."""

    image: str = Field(description="As pyxis takes it: a .sqsh file or registry#image:tag.")
    mounts: list[str] = Field(default_factory=list, description="SOURCE:TARGET each.")


class ClusterProfile(Section):
    """A cluster profile."""

    backend: Literal["slurm", "local"] = Field("slurm", description="local: processes on this machine, no scheduler.")
    partition: str | None = Field(None, description="Partition; the cluster's default when omitted.")
    account: str | None = Field(None, description="Account that is charged.")
    qos: str | None = Field(None, description="Quality of service.")
    nodes: PositiveInt = Field(1, description="Nodes, where the command line does not say.")
    min_nodes: PositiveInt | None = Field(
        None, description="Start, and after a lost node go on, with as few as these; always `nodes` when omitted."
    )
    max_nodes: PositiveInt | None = Field(None, description="Take up to so many where they are free.")
    gpus_per_node: NonNegativeInt = Field(0, description="GPUs of a node; one process each. 0: processes on CPU.")
    gpu_type: str | None = Field(None, description="Which GPUs, where a partition has several kinds, e.g. h100.")
    processes_per_node: PositiveInt | None = Field(
        None, description="Processes of a node without GPUs; one a GPU otherwise."
    )
    cpus_per_gpu: PositiveInt = Field(1, description="CPUs of each process: itself and its loader workers.")
    memory: str | None = Field(None, description="Memory of a node, e.g. 200G; 0 is all of it. The cluster's default.")
    time: str = Field("24:00:00", description="Time limit, e.g. 24:00:00 or 2-00:00:00; the job goes on after it.")
    signal_delay: PositiveInt = Field(
        180, description="Seconds before the time limit at which it is asked to save and leave."
    )
    max_restarts: NonNegativeInt = Field(3, description="Restarts in a row without progress before it is given up.")
    constraint: str | None = Field(None, description="Node features, e.g. a100&nvlink.")
    exclude: str | None = Field(None, description="Nodes to stay off, e.g. node[03,17].")
    setup: list[str] = Field(default_factory=list, description="Shell lines before the run: module load, source …")
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment variables; they are written into the job's script, so no keys."
    )
    container: Container | None = Field(None, description="Run the processes in a container.")
    python: str | None = Field(None, description="Interpreter of the processes; the one that submits when omitted.")
    srun: list[str] = Field(default_factory=list, description="More options of srun, e.g. --mpi=none.")
    sbatch: dict[str, str | int | bool] = Field(
        default_factory=dict, description="More options of sbatch by their long names, e.g. reservation: robots."
    )

    @field_validator("environment", mode="before")
    @classmethod
    def _text(cls, values: Any) -> Any:
        """Convert numbers to text, as environment variables are text."""
        if not isinstance(values, dict):
            return values
        bad = [name for name in values if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII)]
        if bad:
            raise ValueError(f"{', '.join(map(repr, bad))} cannot name an environment variable")
        return {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in values.items()}

    @model_validator(mode="after")
    def _fields_agree(self) -> ClusterProfile:
        problems = []
        least, most = self.node_range(self.nodes)
        if not least <= self.nodes <= most:
            problems.append(f"min_nodes ≤ nodes ≤ max_nodes does not hold: {least}, {self.nodes}, {most}")
        if self.gpus_per_node and self.processes_per_node not in (None, self.gpus_per_node):
            problems.append("processes_per_node: there is one process a GPU; leave it out, or gpus_per_node")
        if self.gpu_type and not self.gpus_per_node:
            problems.append("gpu_type: needs gpus_per_node")
        try:
            if self.backend == "slurm" and self.signal_delay >= seconds(self.time):
                problems.append(f"signal_delay: {self.signal_delay} s are no less than the time limit {self.time}")
        except ValueError as e:
            problems.append(f"time: {e}")
        for option in self.sbatch:
            if option.replace("_", "-") in _OWN:
                problems.append(f"sbatch: {option} is decided by the profile's fields or the launcher; leave it out")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def processes(self) -> int:
        """Processes of one node."""
        return self.gpus_per_node or self.processes_per_node or 1

    def node_range(self, nodes: int) -> tuple[int, int]:
        """(minimum, maximum) nodes of a job with this `nodes` setting."""
        return self.min_nodes or nodes, self.max_nodes or nodes


def load_profile(name: str, overrides: Sequence[str] = ()) -> tuple[str, ClusterProfile]:
    """Read a profile: a file, or the name of one in `slurm/`. Returns (name, profile).

    `overrides` are `field=value` each, and win. "local" exists without a file, too.

    Raises:
        ProfileError: With every problem, each with its file and line.
    """
    path = find(name)
    if path is None:
        if name == LOCAL:
            return LOCAL, ClusterProfile.model_validate({"backend": "local", **_plain(overrides)})
        hint = did_you_mean(name, names()) or f"there are {', '.join(names())}"
        raise ProfileError([f"--cluster {name}: no such file and no such profile in {FOLDER}/; {hint}"])
    merged = merge(path, overrides)
    profile, wrong = validate_as(ClusterProfile, merged)
    problems = [*merged.problems, *wrong]
    if profile is None or problems:
        raise ProfileError(problems)
    return path.stem, profile


def names() -> list[str]:
    """Names of the existing profiles."""
    return sorted({LOCAL, *(p.stem for folder in _folders() for p in folder.glob("*.yaml"))})


def find(name: str) -> Path | None:
    """The file of a profile."""
    given = Path(name).expanduser()
    if given.suffix in (".yaml", ".yml") or len(given.parts) > 1:
        return given if given.is_file() else None
    return next((path for folder in _folders() if (path := folder / f"{name}.yaml").is_file()), None)


def seconds(limit: str) -> int:
    """A Slurm time limit in seconds.

    Raises:
        ValueError: It is not a time limit.
    """
    match = _TIME.fullmatch(limit)
    if match is None:
        raise ValueError(f"{limit!r} is no time limit; write HH:MM:SS, D-HH:MM:SS or minutes")
    a, b, c = (int(match[n]) if match[n] else 0 for n in "abc")
    if match["d"] is not None:
        return int(match["d"]) * 86400 + a * 3600 + b * 60 + c
    if match["c"] is not None:
        return a * 3600 + b * 60 + c
    return a * 60 + b  # minutes[:seconds]


def _folders() -> list[Path]:
    """Folders searched for profiles: here, then those that come with stamo."""
    return [Path.cwd() / FOLDER, shipped.PROFILES]


def _plain(overrides: Sequence[str]) -> dict[str, Any]:
    from stamo_dist.recipe.lines import read_override

    layers = [read_override(o) for o in overrides]
    problems = [p for layer in layers for p in layer.problems]
    if problems:
        raise ProfileError(problems)
    return {name: value for layer in layers for name, value in layer.value.items()}
