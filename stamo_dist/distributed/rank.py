"""This process's rank among the processes of the run. Needs no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1


#: Environment variable set by a launcher that exports the model itself after the processes have exited.
EXPORTS_LATER = "STAMO_EXPORTS_LATER"


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_node(self) -> range:
        """The ranks of this process's node."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)


def few_of(ranks: Sequence[int]) -> str:
    """The first ranks, and the number of further ones."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ", ".join(map(str, ranks[:8])) + more


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ReservedPort:
    """A free TCP port of this machine that nobody else is given until `release`, or this process's end.

    It is bound, and nothing listens there: only a socket that names the port and sets SO_REUSEADDR, as that of torch's
    store, can be bound to it too.
    """

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_INET6)
            self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # IPv4 too
            self._bind("::")
        except OSError:  # no IPv6 here
            self._socket = socket.socket(socket.AF_INET)
            self._bind("")
        self.number = int(self._socket.getsockname()[1])

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        self._socket.close()

    def _bind(self, address: str) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, 0))


_reserved: list[ReservedPort] = []  # of a single process, until its end


def reserve_port() -> int:
    """A free port, reserved until this process ends."""
    _reserved.append(ReservedPort())
    return _reserved[-1].number


def world_from_environment() -> World:
    """Read the rank environment that torchrun, `stamo train --nproc` or Slurm set; a single process gets a default one.

    DeepSpeed and FSDP need a process group even for one process, so a single process gets a rendezvous, too.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(reserve_port()),
        )
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))  # as the launcher does; accelerate warns where it is not
    env = os.environ
    if launcher := env.get("STAMO_LAUNCHED"):
        # If the launcher is killed, the kernel signals its ranks. Before all ranks have met there is nothing to save,
        # and some may never have been started: so they are killed at once.
        _when_launcher_dies(signal.SIGKILL)
        if os.getppid() != int(launcher):
            sys.exit(f"rank {env['RANK']}: what started it has been killed")
    return World(
        rank=int(env["RANK"]),
        size=int(env["WORLD_SIZE"]),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        local_size=int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
    )


def survive_launcher() -> None:
    """From now on (after the ranks have met), this rank saves and exits if the launcher is killed."""
    if "STAMO_LAUNCHED" in os.environ:
        _when_launcher_dies(signal.SIGTERM)


def _when_launcher_dies(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
