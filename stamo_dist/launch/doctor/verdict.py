"""The findings of `stamo doctor`, one line each with a remedy; and judging the nodes' reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from stamo_dist.launch.doctor.disk import Disk
from stamo_dist.launch.doctor.probe import Report
from stamo_dist.words import counted

Level = Literal["error", "warning", "note", "fine"]
_MARK: dict[Level, tuple[str, str]] = {
    "error": ("✗", "bold red"),
    "warning": ("!", "yellow"),
    "note": ("·", "cyan"),
    "fine": ("✓", "green"),
}
_NODES, _NET, _DISKS = "Nodes", "Network between ranks", "Disks"
_SLOW_NAME = 1.0  # seconds to look up one's own name
_SLOW_INIT = 15.0  # seconds to set up a process group
_SKEW = 1.0  # seconds between clocks
_SHM = 64 << 20  # bytes of /dev/shm for each rank that NCCL connects through it
_FILES = 4096  # open files
_SLOW_WRITE, _SLOW_SMALL = 30e6, 50.0  # bytes and files per second
_ROOM = 20 << 30  # bytes
_BUS = {"one": 10e9, "many": 1e9}  # bytes per second that NCCL reaches at least on one node, between nodes
_GONE = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Finding:
    """The result of one check. All but `fine` ones have a remedy."""

    level: Level
    area: str  # its part of the report
    what: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.level == "fine" or self.fix, f"no fix: {self.what}"


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings by area, and the number of each kind."""
    for area in dict.fromkeys(f.area for f in findings):
        console.print(Text(area, style="bold"))
        for f in findings:
            if f.area == area:
                mark, style = _MARK[f.level]
                console.print(Text.assemble("  ", (mark, style), " ", f.what), soft_wrap=True)
                if f.fix:
                    console.print(Text.assemble("    → ", (f.fix, "italic")), soft_wrap=True)
    count = {level: sum(f.level == level for f in findings) for level in _MARK}
    plural = {"error": "errors", "warning": "warnings", "note": "notes", "fine": "fine"}
    counted = [f"{n} {level if n == 1 else plural[level]}" for level, n in count.items() if n]
    console.print(Text(", ".join(counted), style="bold"))


def failed(findings: Sequence[Finding]) -> bool:
    return any(f.level == "error" for f in findings)


def judge_reports(reports: Sequence[Report], ranks: int, *, log: str) -> Iterator[Finding]:
    """Findings about the nodes, their network and their disks; `log` has the output of missing ranks."""
    missing = sorted(set(range(ranks)) - {r.rank for r in reports})
    if missing:
        what = f"of {ranks} ranks {len(missing)} left no report (rank {_few(missing)})"
        fix = f"see {log}: the interpreter, the environment or the folder is missing on their nodes"
        yield Finding("error", _NODES, what, fix)
    if not reports:
        return
    first = [r for r in reports if r.local_rank == 0]
    yield from _machines(reports, first)
    yield from _network(reports, first)
    for r in reports:
        if r.error:
            yield _stuck(r, reports)
    yield from _disks(first)


def _machines(reports: Sequence[Report], first: Sequence[Report]) -> Iterator[Finding]:
    yield from _alike(first, "versions", lambda r: {"python": r.python, **r.packages}, "set one environment up for all")
    yield from _alike(first, "GPUs", lambda r: {"GPUs": " + ".join(r.gpus) or "none"}, "set constraint or gpu_type")
    for r in first:
        if r.driver and r.stage != "looking at this machine" and not r.cuda and r.packages.get("torch"):
            what = f"{r.host} has GPUs (driver {r.driver}), but torch {r.packages['torch']} is built without CUDA"
            fix = "install the CUDA build of torch (pip's default on Linux)"
            yield Finding("error", _NODES, what, fix)
        elif r.driver and r.cuda and len(r.gpus) < r.local_ranks:
            what = f"{r.host} shows {counted(len(r.gpus), 'GPU')} to {r.local_ranks} ranks"
            fix = "set gpus_per_node in the profile; `nvidia-smi` on the node and CUDA_VISIBLE_DEVICES say why"
            yield Finding("error", _NODES, what, fix)
        if r.limits.get("nofile", _FILES) not in range(_FILES, 1 << 62) and r.limits.get("nofile") != -1:
            what = f"{r.host}: a process may open {r.limits['nofile']} files only"
            fix = f"put `ulimit -n {1 << 16}` into the profile's setup lines"
            yield Finding("warning", _NODES, what, fix)
        if len(r.gpus) > 1 and r.shm[1] < _SHM * r.local_ranks:
            what = (
                f"{r.host}: /dev/shm has {_bytes(r.shm[1])} free of {_bytes(r.shm[0])}; NCCL "
                f"connects the {r.local_ranks} ranks of a node through it"
            )
            fix = "containers: --shm-size=8g or --ipc=host; else clear what dead jobs left there"
            yield Finding("warning", _NODES, what, fix)
        if not r.scontrol:
            what = f"{r.host}: there is no scontrol, so no run can queue itself again from there"
            fix = "have the administrator install it, or set RequeueExit=75; else `stamo resume RUN` goes on by hand"
            yield Finding("warning", _NODES, what, fix)
        if abs(r.clock) > _SKEW:
            what = f"{r.host}: its clock is {r.clock:+.1f} s from rank 0's"
            fix = "have the administrator run NTP (chrony); heartbeats and logs go by the clock"
            yield Finding("warning", _NODES, what, fix)
    good = [r for r in reports if not r.error]
    if good:
        r = good[0]
        gpus = f"{len(r.gpus)} × {r.gpus[0]}" if r.gpus else "no GPU"
        hosts = sorted({x.host for x in good})
        named = ", ".join(hosts[:8]) + (" …" if len(hosts) > 8 else "")
        what = (
            f"{named}: {counted(len(good), 'rank')}, {gpus} a node, {counted(r.cpus, 'CPU')} a rank, "
            f"python {r.python}, torch {r.packages.get('torch', 'missing')}, /dev/shm {_bytes(r.shm[0])}"
        )
        yield Finding("fine", _NODES, what)


def _network(reports: Sequence[Report], first: Sequence[Report]) -> Iterator[Finding]:
    many = len(first) > 1
    for r in first:
        for other, result in r.links.items():
            if isinstance(result, str):
                what = f"{r.host} cannot connect to {other}: {result}"
                fix = (
                    f"open TCP between compute nodes (all ports), check that {other} resolves on {r.host} to an "
                    "address of their network, or put the node under exclude in the profile"
                )
                yield Finding("error", _NET, what, fix)
        if many and r.address.startswith("127."):
            what = f"{r.host} takes its own name for {r.address}, which gloo tells the other nodes"
            fix = (
                "environment: {GLOO_SOCKET_IFNAME: eth0} in the profile, with the name of the network interface "
                "(`ip -br address`), or mend /etc/hosts"
            )
            yield Finding("warning", _NET, what, fix)
        if r.resolving > _SLOW_NAME:
            what = (
                f"{r.host} takes {r.resolving:.1f} s to look up its own name and address; gloo does that at every start"
            )
            fix = "list the nodes in /etc/hosts, or mend the reverse DNS zone"
            yield Finding("warning", _NET, what, fix)
    for backend in ("gloo", "nccl"):
        done = [r for r in reports if backend in r.bandwidth]
        if not done:
            continue
        init, lag = max(r.init[backend] for r in done), max(r.latency[backend] for r in done)
        speed = min(r.bandwidth[backend] for r in done)
        about = (
            f"{backend}: set up in {init:.1f} s, {lag * 1e3:.2f} ms a small all-reduce, {speed / 1e9:.2f} GB/s a large"
        )
        least = _BUS["many" if many else "one"]
        if init > _SLOW_INIT:
            fix = "name the interface in the profile's environment (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            yield Finding("warning", _NET, about, fix)
        elif backend == "nccl" and speed < least and len(done) > 1:
            what = f"{about}, less than {least / 1e9:g} GB/s"
            fix = (
                "NCCL_DEBUG=INFO in the profile's environment shows whether it uses NET/IB or NET/Socket, P2P or SHM "
                "within a node; NCCL_IB_HCA and NCCL_SOCKET_IFNAME choose"
            )
            yield Finding("warning", _NET, what, fix)
        else:
            yield Finding("fine", _NET, about)


def _stuck(r: Report, reports: Sequence[Report]) -> Finding:
    """The finding on a rank that did not finish."""
    reached = all(not isinstance(x, str) for other in reports for x in other.links.values())
    what = f"rank {r.rank} @ {r.host} ended while {r.stage}: {r.error}"
    if r.stage.startswith("waiting to see"):
        fix = "the folder must be one that all nodes share: choose a run_dir on such a file system"
    elif r.stage.endswith(("gloo", "nccl")) and not reached:
        fix = "mend the connections named above first"
    elif r.stage.endswith("gloo"):
        fix = "plain TCP works, so name the interface: GLOO_SOCKET_IFNAME in the profile's environment"
    elif r.stage.endswith("nccl"):
        fix = (
            "set NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME in the profile's environment; if NCCL_IB_DISABLE=1 helps, the "
            "InfiniBand set-up is at fault"
        )
    elif r.stage.endswith("torch"):
        fix = "the environment on that node is broken: run `python -c 'import torch'` there"
    else:
        fix = "see the rank's log"
    return Finding("error", _NET if "ing up" in r.stage else _NODES, what, fix)


def _disks(first: Sequence[Report]) -> Iterator[Finding]:
    by_path: dict[str, list[tuple[str, Disk]]] = {}
    for r in first:
        for disk in r.disks:
            by_path.setdefault(disk.path, []).append((r.host, disk))
    for found in by_path.values():
        worst = min(found, key=lambda item: (not item[1].error, item[1].write))
        yield from judge_disk(worst[1], f" on {worst[0]}" if len(first) > 1 else "")


def judge_disk(disk: Disk, where: str = "") -> Iterator[Finding]:
    """Findings on one folder that a run writes to."""
    name = f"{disk.path}{where}"
    if disk.error:
        yield Finding(
            "error", _DISKS, f"{name}: {disk.error}", "choose another folder, or have it mounted and made yours"
        )
        return
    about = (
        f"{name} ({disk.kind or 'unknown'}): {_bytes(disk.free)} free, writes {disk.write / 1e6:.0f} MB/s, reads "
        f"{disk.read / 1e6:.0f} MB/s, {disk.small:.0f} small files/s"
    )
    if disk.kind in _GONE:
        yield Finding(
            "warning", _DISKS, f"{about}; it is memory", "choose a folder on a disk: this one ends with the node"
        )
    elif disk.write < _SLOW_WRITE:
        fix = "checkpoints take long: train.checkpoint.background, or a faster file system for run_dir"
        yield Finding("warning", _DISKS, about, fix)
    elif disk.small < _SLOW_SMALL:
        fix = "the file system is slow at small files: keep the environment and the cache on another"
        yield Finding("warning", _DISKS, about, fix)
    elif disk.free < _ROOM:
        fix = "make room, or lower train.checkpoint.keep; data.cache_limit bounds the cache"
        yield Finding("warning", _DISKS, about, fix)
    else:
        yield Finding("fine", _DISKS, about)
    if abs(disk.clock) > 2:
        what = f"{name}: its time stamps are {disk.clock:+.1f} s from this machine's clock"
        fix = "have the file server and the nodes keep time by NTP: heartbeats are told by time stamps"
        yield Finding("warning", _DISKS, what, fix)


def _alike(first: Sequence[Report], what: str, of: Callable[[Report], dict[str, Any]], fix: str) -> Iterator[Finding]:
    """Whether all nodes have the same value."""
    reference = of(first[0])
    for r in first[1:]:
        other = of(r)
        differing = [k for k in sorted({*reference, *other}) if reference.get(k) != other.get(k)]
        if differing and not r.error:
            listed = ", ".join(f"{k} {reference.get(k)} ≠ {other.get(k)}" for k in differing)
            yield Finding("warning", _NODES, f"{first[0].host} and {r.host} have other {what}: {listed}", f"{fix}")


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if n >= 10 or unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
