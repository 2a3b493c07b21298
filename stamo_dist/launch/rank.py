"""One process of a Slurm job: `srun python -m stamo_dist.launch.rank train RECIPE` is one rank for each task.

It takes its rank from Slurm's variables and its output to a log of its own, and becomes the `stamo` command.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import zlib

if __name__ == "__main__":  # at once: a signal before the run can save would end it; the mask is inherited over exec
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})

from collections.abc import Mapping
from pathlib import Path

from stamo_dist.launch.affinity import bind
from stamo_dist.shipped import IS_WHEEL

#: Set by the job: the folder for the logs, rank 0's log, which start this is, and whether a rank binds itself.
RUN, LOG, START, BIND = "STAMO_RUN", "STAMO_LOG", "STAMO_START", "STAMO_CPU_BIND"


def environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """The rank environment that torch reads, from the variables of a Slurm task.

    The first task is on the node on which srun was called, as in a batch script.
    """
    node = int(slurm["SLURM_NODEID"])
    per_node = _expand(slurm.get("SLURM_STEP_TASKS_PER_NODE") or slurm["SLURM_TASKS_PER_NODE"])
    # Below the ports that connections are given; jobs of the same number of two clusters may share a node.
    start = "/".join(slurm.get(f"SLURM_{name}", "") for name in ("CLUSTER_NAME", "JOB_ID", "RESTART_COUNT"))
    port = 10000 + zlib.crc32(start.encode()) % 20000
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm.get("SLURM_STEP_NUM_TASKS") or slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or slurm["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(port),
        "OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS") or slurm.get("SLURM_CPUS_PER_TASK") or "1",
        "PYTHONUNBUFFERED": "1",
    }


def _expand(counts: str) -> list[int]:
    """`2(x3),1` → [2, 2, 2, 1]."""
    out: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        assert match, f"Slurm writes counts of tasks otherwise than {counts!r}"
        out += [int(match[1])] * int(match[2] or 1)
    return out


def _log_to(run: str, env: Mapping[str, str]) -> None:
    from stamo_dist.launch.record import now, rank_log

    rank = int(env["RANK"])
    log = rank_log(run, rank) if rank or LOG not in env else Path(env[LOG])
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for out in (1, 2):
        os.dup2(file, out)
    if rank:
        start, job = env.get(START, "1"), env["SLURM_JOB_ID"]
        who = f"rank {rank} of {env['WORLD_SIZE']} @ {env.get('SLURMD_NODENAME', os.uname().nodename)}"
        print(f"--- start {start} of job {job}: {who}, {now()}", flush=True)


def main(arguments: list[str]) -> None:
    env = {**os.environ, **environment(os.environ)}
    if run := env.get(RUN):
        _log_to(run, env)
    if env.get(BIND):
        said = bind(int(env["LOCAL_RANK"]), int(env["LOCAL_WORLD_SIZE"]), env)
        print(f"rank {env['RANK']} @ {env.get('SLURMD_NODENAME', os.uname().nodename)}: {said}", flush=True)
    if arguments[:1] != ["train"]:  # other commands do not save and exit: a signal ends them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    entry = Path(__file__).resolve().parents[2] / "run.py"  # exists in a snapshot
    of_snapshot = entry.is_file() and not IS_WHEEL  # another package's run.py may lie beside a wheel
    module = [str(entry), "stamo_dist.cli"] if of_snapshot else ["-m", "stamo_dist.cli"]
    os.execve(sys.executable, [sys.executable, *module, *arguments], env)


if __name__ == "__main__":
    main(sys.argv[1:])
