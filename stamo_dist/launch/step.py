"""The command line with which a job starts its processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stamo_dist.launch import container
from stamo_dist.launch.record import Launch

_WAIT = 20  # seconds for the other tasks to report once one has ended
GPU = "gpu"  # value of a profile's cpu_bind: each process binds itself


def step(launch: Launch, nodes: Sequence[str] | int, *, task: str = "0", srun: str = "srun") -> list[str]:
    """The srun command of a start on these nodes (or this many); `task`: of an array that divides one command."""
    profile, per_node = launch.profile, launch.processes_per_node
    count = nodes if isinstance(nodes, int) else len(nodes)
    assert launch.snapshot is not None, "submit takes one"
    flags, command = container.inside(launch)
    where = [] if isinstance(nodes, int) else [f"--nodelist={','.join(nodes)}"]
    bind, more = profile.get("cpu_bind"), profile.get("srun", ())
    flags += [f"--cpu-bind={'none' if bind == GPU else bind}"] if bind else []
    # The ranks find each other without MPI, whose plugin a cluster's MpiDefault would start.
    flags += [] if any(word.startswith("--mpi") for word in more) else ["--mpi=none"]
    interpreter = profile.get("python") or (container.PYTHON if profile.get("container") else sys.executable)
    return [
        srun, f"--nodes={count}", f"--ntasks={count * per_node}", f"--ntasks-per-node={per_node}", *where,
        f"--cpus-per-task={profile.get('cpus_per_gpu', 1)}", f"--wait={_WAIT}", "--kill-on-bad-exit=0", "--export=ALL",
        "--input=none", *flags, *more, *command, interpreter,
        f"{launch.snapshot}/code/run.py", "stamo_dist.launch.rank",
        *(word.replace("{task}", task) for word in launch.command),
    ]  # fmt: skip
