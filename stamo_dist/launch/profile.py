"""`slurm/*.yaml`: a cluster's resources and how a job requests them. Resources only, never a training knob."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stamo_dist import shipped
from stamo_dist.errors import StamoError
from stamo_dist.launch import conflicts
from stamo_dist.launch.container import problems as container_problems
from stamo_dist.launch.notify import WEBHOOK, variable
from stamo_dist.launch.record import FAILING_NODE_HOURS
from stamo_dist.launch.step import GPU
from stamo_dist.recipe.layers import Merged, did_you_mean, merge
from stamo_dist.recipe.lines import read_override
from stamo_dist.recipe.schema import Section
from stamo_dist.recipe.validate import validate_as

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
FOLDER = "slurm"
LOCAL = "local"

_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


class ProfileError(StamoError):
    """One or more problems in a profile, all at once."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{head} in the profile:", *(f"  - {p}" for p in problems)]))


class Container(Section):
    """A container for the processes; the job, which asks to be queued again, stays outside."""

    kind: Literal["pyxis", "apptainer", "singularity"] = Field(
        "pyxis", description="pyxis: srun's plugin, with enroot; the others: a command that the nodes have."
    )
    image: str = Field(description="pyxis: a .sqsh file or registry#image:tag; apptainer: a .sif file or a folder.")
    mounts: list[str] = Field(
        default_factory=list,
        description="SOURCE:TARGET or SOURCE:TARGET:ro each; run folder and working directory are mounted anyhow.",
    )
    options: list[str] = Field(
        default_factory=list, description="More options of `apptainer exec`, or of pyxis, e.g. --no-home; one each."
    )

    @model_validator(mode="after")
    def _can_be(self) -> Container:
        if found := list(container_problems(self.model_dump())):
            raise ValueError("\n".join(found))
        return self


class Notify(Section):
    """Who is told that a run has ended."""

    webhook: str | None = Field(
        None, description="$NAME: the environment variable with the address, which is a secret, to which it is posted."
    )
    mail: str | None = Field(None, description="user@host, whom Slurm writes (sbatch --mail-user).")
    on: list[Literal["end", "failure"]] = Field(
        ["end", "failure"], min_length=1, description="end: every end; failure: those alone."
    )

    @model_validator(mode="after")
    def _whom(self) -> Notify:
        problems = []
        if self.webhook is None and self.mail is None:
            problems.append("webhook or mail: name one")
        if self.webhook is not None and not WEBHOOK.fullmatch(self.webhook):
            problems.append("webhook: write $NAME and `export NAME=https://…` where you submit: an address is a secret")
        if self.mail is not None and not re.fullmatch(r"[^\s,@]+(@[^\s,@]+)?", self.mail):
            problems.append(f"mail: {self.mail!r} is no address")
        if problems:
            raise ValueError("\n".join(problems))
        return self


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
    gpu_request: Literal["gpus-per-node", "gres", "gpus"] = Field(
        "gpus-per-node",
        description="How the cluster wants GPUs asked for: --gpus-per-node=8, --gres=gpu:8 or --gpus=16.",
    )
    processes_per_node: PositiveInt | None = Field(
        None, description="Processes of a node without GPUs; one a GPU otherwise."
    )
    cpus_per_gpu: PositiveInt = Field(1, description="CPUs of each process: itself and its loader workers.")
    cpu_bind: str | None = Field(
        None,
        description="gpu: each process keeps to the CPUs beside its GPU. Or a value of srun's --cpu-bind, e.g. cores.",
    )
    exclusive: bool = Field(False, description="Whole nodes, also where fewer CPUs or GPUs are asked for.")
    segment: PositiveInt | None = Field(
        None, description="Nodes in blocks of so many that lie close together (--segment, Slurm 24.05 and later)."
    )
    memory: str | None = Field(None, description="Memory of a node, e.g. 200G; 0 is all of it. The cluster's default.")
    time: str = Field("24:00:00", description="Time limit, e.g. 24:00:00 or 2-00:00:00; the job goes on after it.")
    signal_delay: PositiveInt = Field(
        180, description="Seconds before the time limit at which it is asked to save and leave."
    )
    max_restarts: NonNegativeInt = Field(3, description="Restarts in a row without progress before it is given up.")
    constraint: str | None = Field(None, description="Node features, e.g. a100&nvlink.")
    exclude: str | None = Field(None, description="Nodes to stay off, e.g. node[03,17].")
    failing_node_hours: NonNegativeFloat = Field(
        FAILING_NODE_HOURS,
        description="Hours for which starts stay off a node on which two failed; 0: never.",
    )
    modules: list[str] = Field(
        default_factory=list, description="Modules to load; one that cannot be loaded ends the job, with code 2."
    )
    setup: list[str] = Field(default_factory=list, description="Shell lines before the run: source …, ulimit …")
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment variables; they are written into the job's script, so no keys."
    )
    container: Container | None = Field(None, description="Run the processes in a container.")
    notify: Notify | None = Field(None, description="Who is told that a run has ended, by webhook or mail.")
    python: str | None = Field(
        None,
        description="Interpreter of the processes; when omitted the one that submits, in a container its python3.",
    )
    srun: list[str] = Field(default_factory=list, description="More options of srun, e.g. --distribution=block:block.")
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
        problems += [*self._of_nodes(), *conflicts.of_sbatch(self.sbatch, self.gpus_per_node)]
        problems += [*conflicts.of_srun(self.srun), *conflicts.of_setup(self.setup)]
        problems += self._unheard()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _of_nodes(self) -> Iterator[str]:
        """What is wrong with the fields that say which nodes and GPUs, and what a process gets there."""
        counts = {self.nodes, *self.node_range(self.nodes)}
        if self.segment and any(count % self.segment for count in counts):
            text = ", ".join(map(str, sorted(counts)))
            yield f"segment: blocks of {self.segment} nodes do not divide {text} nodes; change nodes, or leave it out"
        if self.gpu_request == "gpus" and len(counts) > 1:
            yield (
                "gpu_request: gpus is a number for the whole job, which min_nodes and max_nodes leave open; "
                "write gres or gpus-per-node"
            )
        if self.cpu_bind == GPU and not self.gpus_per_node:
            yield "cpu_bind: gpu needs gpus_per_node"
        if self.cpu_bind and any(word.startswith("--cpu-bind") for word in self.srun):
            yield "srun: --cpu-bind is said by cpu_bind too; leave one of them out"
        bad = [name for name in self.modules if not name.strip() or name.startswith("-") or re.search(r"\s", name)]
        if bad:
            yield f"modules: {bad[0]!r} is no name of a module; one each, other commands of `module` are for setup"
        if self.backend == LOCAL and self.container is not None:
            yield "container: is for Slurm's jobs; start stamo itself in the container, or leave it out"

    def _unheard(self) -> list[str]:
        """Problems of `notify` beside the other fields."""
        if self.notify is None:
            return []
        problems = []
        if self.notify.mail and self.backend == "local":
            problems.append("notify.mail: Slurm sends it, and this profile is of this machine; give notify.webhook")
        if self.notify.mail and {option.replace("_", "-") for option in self.sbatch} & {"mail-user", "mail-type"}:
            problems.append("sbatch: mail-user and mail-type are decided by notify.mail; leave them out")
        if self.notify.webhook and (name := variable(self.notify.webhook)) in self.environment:
            problems.append(f"environment: {name} is written into the job's script, and a secret; export it instead")
        return problems

    @property
    def processes(self) -> int:
        """Processes of one node."""
        return self.gpus_per_node or self.processes_per_node or 1

    def gpu_options(self, nodes: int) -> dict[str, str | int]:
        """The sbatch options that ask for the GPUs of so many nodes."""
        if not self.gpus_per_node:
            return {}
        count = self.gpus_per_node * (nodes if self.gpu_request == "gpus" else 1)
        value = f"{self.gpu_type}:{count}" if self.gpu_type else count
        if self.gpu_request != "gres":
            return {self.gpu_request: value}
        others = self.sbatch.get("gres")  # resources that are no GPUs
        return {"gres": f"gpu:{value}" + (f",{others}" if others else "")}

    def node_range(self, nodes: int) -> tuple[int, int]:
        """(minimum, maximum) nodes of a job with this `nodes` setting."""
        return self.min_nodes or nodes, self.max_nodes or nodes


@dataclass(frozen=True)
class Resources:
    """Resources of the command line that override the profile; None: the profile's."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None

    def changes(self) -> list[str]:
        """The profile fields that it overrides, `field=value` each."""
        asked = {"gpus_per_node": self.gpus_per_node, "time": self.time}
        found = [f"{name}={value}" for name, value in asked.items() if value]
        found += ["processes_per_node=null"] if self.gpus_per_node else []  # one process per GPU
        nodes = [] if self.nodes is None else [f"nodes={self.nodes}", "min_nodes=null", "max_nodes=null"]
        return [*found, *nodes]


AS_PROFILED = Resources()


def load_profile(name: str, overrides: Sequence[str] = ()) -> tuple[str, ClusterProfile]:
    """Read a profile: a file, or the name of one in `slurm/`. Returns (name, profile).

    `overrides` are `field=value` each, and win. "local" exists without a file, too.

    Raises:
        ProfileError: With every problem, each with its file and line.
    """
    path = find(name)
    if path is None:
        if name == LOCAL:
            return LOCAL, known_profile({"backend": "local"}, overrides, LOCAL)
        hint = did_you_mean(name, names()) or f"there are {', '.join(names())}"
        raise ProfileError([f"--cluster {name}: no such file and no such profile in {FOLDER}/; {hint}"])
    return path.stem, _checked(merge(path, overrides))


def known_profile(values: Mapping[str, Any], overrides: Sequence[str], name: str) -> ClusterProfile:
    """A profile that is in no file, as `load_profile`; `name`: how messages call it.

    Raises:
        ProfileError: With every problem.
    """
    merged = Merged(value=dict(values), places={(): name})
    for override in overrides:
        merged.add(read_override(override), override=True)
    return _checked(merged)


def _checked(merged: Merged) -> ClusterProfile:
    profile, wrong = validate_as(ClusterProfile, merged)
    problems = [*merged.problems, *wrong]
    if profile is None or problems:
        raise ProfileError(problems)
    return profile


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
