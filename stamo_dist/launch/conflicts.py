"""Options of a profile, and variables of the shell, that contradict what the launcher asks Slurm for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_LEAVE = "leave it out"
_SIGNAL = "signal_delay says how many seconds before the time limit a run is asked to save and leave"
_GPUS = "write gpus_per_node, and gpu_request for how they are asked for"
#: sbatch options that fields or the launcher decide → what to write.
_SBATCH = {
    **dict.fromkeys((
        "job-name", "ntasks", "ntasks-per-node", "ntasks-per-gpu", "output", "error", "open-mode", "requeue",
        "no-requeue", "array", "dependency", "chdir", "kill-on-invalid-dep", "wrap",
    ), _LEAVE),
    **{name: f"write {name}" for name in ("nodes", "time", "partition", "account", "qos", "constraint", "exclude")},
    **dict.fromkeys(("gpus-per-node", "gpus", "gpus-per-task", "gpus-per-socket"), _GPUS),
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "write cpus_per_gpu"),
    "mem": "write memory", "signal": _SIGNAL,
    "container-image": "it would put the job itself, which asks to be queued again, inside; write container",
}  # fmt: skip
#: The same of srun, whose options are for the processes.
_SRUN = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node", "nodelist", "wait", "kill-on-bad-exit", "export"), _LEAVE),
    "cpus-per-task": "write cpus_per_gpu", "signal": _SIGNAL,
    **dict.fromkeys(("gpus", "gpus-per-node", "ntasks-per-gpu"), _GPUS),
    **dict.fromkeys(("gpus-per-task", "gpu-bind", "tres-per-task"), (
        "each process takes its GPU by its number on the node, and would see one GPU only; "
        "cpu_bind: gpu keeps it to the CPUs beside it"
    )),
    **dict.fromkeys(("container-image", "container-mounts", "container-workdir", "container-env"), "write container"),
}  # fmt: skip
_SHORT = {"N": "nodes", "n": "ntasks", "c": "cpus-per-task", "w": "nodelist", "W": "wait", "K": "kill-on-bad-exit"}
#: Where sbatch's variable is not SBATCH_ and the option.
_VARIABLES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX"}
#: Variables that ask for something else beside what the script asks for.
_BESIDE = {
    "SBATCH_NO_REQUEUE": "requeue", "SBATCH_GPUS": "gpus", "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GPUS_PER_TASK": "gpus-per-task", "SBATCH_GRES": "gres", "SBATCH_CPUS_PER_GPU": "cpus-per-gpu",
    "SBATCH_ARRAY_INX": "array",
}  # fmt: skip


def of_sbatch(options: Mapping[str, Any], gpus_per_node: int) -> Iterator[str]:
    """What is wrong with a profile's `sbatch`."""
    for given in options:
        option = given.replace("_", "-")
        if option in _SBATCH:
            yield f"sbatch: {given} is decided by the profile's fields or the launcher; {_SBATCH[option]}"
        elif len(option) < 2 or option.startswith("-"):
            yield f"sbatch: {given!r} is no long name of an option; write it as `reservation: robots`, without dashes"
    if gpus_per_node and re.search(r"\bgpu\b", str(options.get("gres", ""))):
        yield "sbatch: gres asks for GPUs beside gpus_per_node; write gpu_request: gres"


def of_srun(options: Sequence[str]) -> Iterator[str]:
    """What is wrong with a profile's `srun`."""
    for word in options:
        match = re.match(r"--([a-z][\w-]*)|-([A-Za-z])", word)
        option = (match[1] or _SHORT.get(match[2], "")) if match else ""
        if option in _SRUN and word != "--gpu-bind=none":
            yield f"srun: {word} is decided by the profile's fields or the launcher; {_SRUN[option]}"


def of_setup(lines: Sequence[str]) -> Iterator[str]:
    """What is wrong with a profile's `setup`."""
    for line in "\n".join(lines).splitlines():
        if line.startswith("#SBATCH"):
            yield f"setup: {line!r} is for sbatch; write it under sbatch:, without #SBATCH and dashes"


def of_shell(script: str, environ: Mapping[str, str]) -> Iterator[str]:
    """Variables of sbatch, which win over a script's own options, that say otherwise than this script."""
    asked = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)(?:=(.*))?$", script))
    names = {f"SBATCH_{_VARIABLES.get(o, o.replace('-', '_').upper())}": o for o in asked}
    for name, value in sorted(environ.items()):
        option = names.get(name) or _BESIDE.get(name)
        if option is None or (name in names and value in (asked[option].strip("'"), asked[option] or value)):
            continue
        hint = f"; {_SIGNAL}" if option == "signal" else ""
        yield f"{name}={value} in your environment would win over what the script asks for; `unset {name}`{hint}"
