"""One rank of the doctor's job: checks its node and the connection to the others.

After every stage it writes its report to `OUT/rank_00003.json`, which shows how far a rank got that hangs or dies.
Nodes try plain TCP first: if NCCL or gloo then fail, it is known whether the network is the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from stamo_dist.distributed.rank import cores
from stamo_dist.launch import affinity, slurm
from stamo_dist.launch.doctor.disk import Disk, measure

PACKAGES = ("torch", "accelerate", "deepspeed", "diffusers", "transformers", "mosaicml-streaming", "numpy", "wandb")
NETWORK = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "RCCL_")  # what variables of the network begin with
_MEET = 30.0  # seconds for all ranks to appear
_CONNECT = 5.0  # seconds for one TCP connection
_INIT = 60.0  # seconds for a process group
_LARGE = 256 << 18  # fp32 numbers of a large all-reduce between GPUs
LIMIT = 100.0  # seconds after which a rank gives up


@dataclass
class Report:
    """The findings of one rank; seconds, bytes, and bytes per second."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    host: str
    stage: str = "looking at this machine"  # current stage, or "done"
    error: str = ""  # the error that ended it
    python: str = ""
    executable: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    cpus: int = 0
    may_use: str = ""  # the CPUs that it is bound to
    beside: str = ""  # the CPUs beside its GPU, "" if unknown
    network: dict[str, str] = field(default_factory=dict)  # variables that NCCL, gloo and their transports read
    address: str = ""  # addresses of its own host name
    resolving: float = 0.0  # seconds to resolve its own name and back
    port: int = 0  # port for connections, on the first rank of a node
    shm: tuple[int, int] = (0, 0)  # size and free bytes of /dev/shm
    limits: dict[str, int] = field(default_factory=dict)
    scontrol: bool = True  # whether the command is where srun is
    driver: str = ""  # of the GPUs
    gpus: list[str] = field(default_factory=list)
    cuda: str = ""  # that torch was built for
    disks: list[Disk] = field(default_factory=list)
    wandb: str | None = None  # why W&B cannot be reached; "" if it can, None if not checked
    links: dict[str, float | str] = field(default_factory=dict)  # node → seconds to connect, or the error
    init: dict[str, float] = field(default_factory=dict)  # backend → seconds to set it up
    latency: dict[str, float] = field(default_factory=dict)  # backend → seconds of an all-reduce of one number
    bandwidth: dict[str, float] = field(default_factory=dict)  # backend → bus bandwidth of a large all-reduce
    clock: float = 0.0  # seconds by which its clock is ahead of rank 0's


def main(out: Path, paths: Sequence[str], wandb: str) -> int:
    """Run the probe as the rank given by the environment; returns the exit code.

    Args:
        out: Folder for the reports, the same for every rank.
        paths: Folders whose disks are measured, once a node.
        wandb: Host to reach, "" for none.
    """
    env = os.environ
    rank, ranks = int(env["RANK"]), int(env["WORLD_SIZE"])
    local_rank, local_ranks = int(env["LOCAL_RANK"]), int(env["LOCAL_WORLD_SIZE"])
    report = Report(rank, ranks, local_rank, local_ranks, socket.gethostname())
    file = out / f"rank_{report.rank:05d}.json"

    def enter(stage: str) -> None:
        report.stage = stage
        part = file.with_suffix(".tmp")
        part.write_text(json.dumps(asdict(report)))
        part.replace(file)

    def give_up() -> None:
        report.error = f"not done after {LIMIT:.0f} s"
        enter(report.stage)
        os._exit(1)

    alarm = threading.Timer(LIMIT, give_up)
    alarm.daemon = True
    alarm.start()
    try:
        probe(report, out, paths, wandb, enter)
    except Exception as e:  # any exception belongs in the report
        report.error = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
        enter(report.stage)
    return int(bool(report.error))


def probe(report: Report, out: Path, paths: Sequence[str], wandb: str, enter: Callable[[str], None]) -> None:
    """Fill in the report; `enter` prints and records the stage that begins."""
    look(report)
    first = report.local_rank == 0
    with socket.create_server(("", 0)) as listener:
        report.port = listener.getsockname()[1]
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        enter("waiting to see the other ranks' files")
        others = _meet(out, report.ranks)
        if first:
            enter("connecting to the other nodes")
            report.links = _connect(others, report.host)
            if wandb:
                report.wandb = reach(wandb)
            enter("measuring disks")
            report.disks = [measure(path) for path in paths]
        enter("importing torch")
        import torch
        import torch.distributed as dist

        from stamo_dist.device import Device

        report.cuda = torch.version.cuda or ""
        report.gpus = Device.current().all_names
        enter("setting up gloo")
        began = time.perf_counter()
        dist.init_process_group("gloo", timeout=timedelta(seconds=_INIT))
        dist.barrier()
        report.init["gloo"] = time.perf_counter() - began
        _measure(report, "gloo", torch.zeros(16 << 18))
        times: list[float] = [0.0] * report.ranks
        dist.barrier()
        dist.all_gather_object(times, time.time())
        report.clock = times[report.rank] - times[0]
        if (device := Device.current()).is_gpu:
            enter("setting up nccl")
            device.select(report.local_rank)
            big = torch.zeros(_LARGE, device=device.torch_device)
            began = time.perf_counter()
            group = dist.new_group(backend=device.backend, timeout=timedelta(seconds=_INIT))
            dist.all_reduce(big[:1], group=group)
            _ = big[0].item()
            report.init["nccl"] = time.perf_counter() - began
            _measure(report, "nccl", big, group)
        dist.barrier()
        enter("done")


def look(report: Report) -> None:
    """Fill in the facts found without other ranks and without torch."""
    report.python, report.executable = sys.version.split()[0], sys.executable
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            report.packages[name] = metadata.version(name)
    report.cpus = cores()
    if hasattr(os, "sched_getaffinity"):
        report.may_use = affinity.short(frozenset(os.sched_getaffinity(0)))
        near = affinity.beside_gpus(os.environ)
        report.beside = affinity.short(near[report.local_rank]) if report.local_rank < len(near) else ""
    report.network = {k: v for k, v in sorted(os.environ.items()) if k.startswith(NETWORK)}
    began = time.perf_counter()
    with contextlib.suppress(OSError):
        report.address = socket.gethostbyname(report.host)
        socket.gethostbyaddr(report.address)
    report.resolving = time.perf_counter() - began
    with contextlib.suppress(OSError):
        shm = os.statvfs("/dev/shm")
        report.shm = (shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize)
    report.limits = {
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    }
    report.scontrol = slurm.tool("srun") is None or slurm.tool("scontrol") is not None
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
            report.driver = found.stdout.strip().splitlines()[0]


def reach(host: str) -> str:
    """Why HTTPS to `host` fails, "" if it works."""
    try:
        socket.create_connection((host, 443), timeout=_CONNECT).close()
    except OSError as e:
        return e.strerror or str(e)
    return ""


def _accept(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


def _meet(out: Path, ranks: int) -> list[dict[str, Any]]:
    """Wait for and return the reports of all ranks.

    Raises:
        TimeoutError: Some are missing.
    """
    deadline = time.monotonic() + _MEET
    while True:
        seen = sorted(out.glob("rank_*.json"))
        if len(seen) >= ranks:
            return [json.loads(file.read_text()) for file in seen]
        if time.monotonic() > deadline:
            here = {int(file.stem.removeprefix("rank_")) for file in seen}
            missing = ", ".join(str(rank) for rank in range(ranks) if rank not in here)
            raise TimeoutError(f"after {_MEET:.0f} s {out} shows no file of rank {missing}")
        time.sleep(0.1)


def _connect(others: list[dict[str, Any]], me: str) -> dict[str, float | str]:
    links: dict[str, float | str] = {}
    for other in others:
        if other["local_rank"] == 0 and other["host"] != me:
            began = time.perf_counter()
            try:
                socket.create_connection((other["host"], other["port"]), timeout=_CONNECT).close()
                links[other["host"]] = time.perf_counter() - began
            except OSError as e:
                links[other["host"]] = f"port {other['port']}: {e.strerror or e}"
    return links


def _measure(report: Report, backend: str, big: Any, group: Any = None) -> None:
    """Time all-reduces of one number and of all of `big`."""
    import torch.distributed as dist

    def timed(tensor: Any, times: int) -> float:
        dist.all_reduce(tensor, group=group)
        _ = tensor[0].item()
        began = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(tensor, group=group)
        _ = tensor[0].item()
        return (time.perf_counter() - began) / times

    report.latency[backend] = timed(big[:1], 20)
    share = 2 * (report.ranks - 1) / report.ranks  # factor of the data that passes over every rank's link
    report.bandwidth[backend] = share * big.nbytes / timed(big, 3)


def read(out: Path) -> list[Report]:
    """The existing reports, by rank."""
    found = []
    for file in sorted(out.glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            raw = json.loads(file.read_text())
            found.append(Report(**{**raw, "disks": [Disk(**d) for d in raw["disks"]], "shm": tuple(raw["shm"])}))
    return found
