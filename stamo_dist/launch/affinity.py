"""Keeping a process to the CPUs beside its GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_SYS = Path("/sys")


def bind(local_rank: int, local_size: int, environ: Mapping[str, str], system: Path = _SYS) -> str:
    """Keep this process to its share of the CPUs beside its GPU, if it may use any; returns what was done, in words.

    Processes whose GPUs have the same CPUs share them out by cores.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    near = [cpus & allowed for cpus in beside_gpus(environ, system)]
    if len(near) < local_size:
        return f"not bound: {len(near)} GPUs of {local_size} processes are known here"
    if not near[local_rank]:
        return f"not bound: none of its CPUs {short(allowed)} is beside GPU {local_rank}"
    together = [i for i in range(local_size) if near[i] == near[local_rank]]
    cores = _cores(near[local_rank], system)
    if len(cores) >= len(together):
        first, last = (len(cores) * (together.index(local_rank) + i) // len(together) for i in (0, 1))
        cores = cores[first:last]
    mine = frozenset[int]().union(*cores)
    os.sched_setaffinity(0, mine)
    return f"bound to the CPUs {short(mine)}, beside GPU {local_rank}"


def beside_gpus(environ: Mapping[str, str], system: Path = _SYS) -> list[frozenset[int]]:
    """The CPUs beside each GPU that this process sees, in CUDA's order; none where NVIDIA's driver does not tell."""
    if (command := shutil.which("nvidia-smi", path=environ.get("PATH"))) is None:
        return []
    query = [command, "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line.count(",") == 2]
    seen = environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        chosen = (next((r for r in rows if r[0] == s or (s and r[1].startswith(s))), None) for s in seen.split(","))
        rows = [row for row in chosen if row is not None]
    return [_cpus(system, bus) for _, _, bus in rows]


def short(cpus: frozenset[int]) -> str:
    """{0, 1, 2, 8} → 0-2,8"""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in ranges)


def long(cpus: str) -> frozenset[int]:
    """0-2,8 → {0, 1, 2, 8}"""
    found = re.findall(r"(\d+)(?:-(\d+))?", cpus)
    return frozenset(cpu for a, b in found for cpu in range(int(a), int(b or a) + 1))


def _cpus(system: Path, bus: str) -> frozenset[int]:
    """The CPUs beside a PCI device, which nvidia-smi names as 00000000:3B:00.0 and the kernel as 0000:3b:00.0."""
    try:
        return long((system / "bus/pci/devices" / bus.lower()[-12:] / "local_cpulist").read_text())
    except OSError:
        return frozenset()


def _cores(cpus: frozenset[int], system: Path) -> list[frozenset[int]]:
    """These CPUs by the cores that they are threads of."""
    cores: dict[frozenset[int], None] = {}
    for cpu in sorted(cpus):
        try:
            threads = long((system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            threads = frozenset({cpu})
        cores[threads & cpus] = None
    return list(cores)
