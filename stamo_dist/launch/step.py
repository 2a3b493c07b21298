"""The srun line of a job: one task for each process of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from stamo_dist.launch.record import Launch

_WAIT = 20  # seconds for the other tasks once one has ended: to say why, not to go on


def step(launch: Launch, nodes: Sequence[str] | int, *, task: str = "0", srun: str = "srun") -> list[str]:
    """What a start on these nodes (or so many of them) runs; `task`: of an array that shares one command out."""
    profile, per_node = launch.profile, launch.processes_per_node
    count = nodes if isinstance(nodes, int) else len(nodes)
    assert launch.snapshot is not None, "submit takes one"
    container = profile.get("container") or {}
    flags = [f"--container-image={container['image']}"] if container else []
    flags += [f"--container-mounts={','.join(container['mounts'])}"] if container.get("mounts") else []
    where = [] if isinstance(nodes, int) else [f"--nodelist={','.join(nodes)}"]
    return [
        srun, f"--nodes={count}", f"--ntasks={count * per_node}", f"--ntasks-per-node={per_node}", *where,
        f"--cpus-per-task={profile.get('cpus_per_gpu', 1)}", f"--wait={_WAIT}", "--kill-on-bad-exit=0", "--export=ALL",
        "--input=none", *flags, *profile.get("srun", ()), profile.get("python") or sys.executable,
        f"{launch.snapshot}/code/run.py", "stamo_dist.launch.rank",
        *(word.replace("{task}", task) for word in launch.command),
    ]  # fmt: skip
