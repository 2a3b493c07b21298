"""The processes of one run: who this one is, and leaving in an orderly way."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from stamo_dist.engine.ports import free_port
from stamo_dist.engine.preempt import EXIT_PREEMPTED
from stamo_dist.errors import StamoError

_PR_SET_PDEATHSIG = 1
#: Seconds that collectives wait where one rank may work alone for long: before the first step, and while exporting.
PATIENCE = 7200.0
T = TypeVar("T")


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


def world_from_environment() -> World:
    """Read the rank environment that torchrun, `stamo train --nproc` or Slurm set; a lone process gets one of its own.

    DeepSpeed and FSDP want a process group even for one process, so a lone process is given a rendezvous too.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    env = os.environ
    if env.get("STAMO_LAUNCHED") and sys.platform == "linux":
        # A launcher that is killed cannot tell its ranks: the kernel does, and they save and leave.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return World(
        rank=int(env["RANK"]),
        size=int(env["WORLD_SIZE"]),
        local_rank=int(env.get("LOCAL_RANK", 0)),
        local_size=int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])),
    )


def set_timeout(seconds: float) -> None:
    """Let the collectives of all process groups wait that long from now on."""
    if not dist.is_initialized():
        return
    for group in list(c10d._world.pg_map):
        if not c10d._rank_not_in_group(group):
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def run_rank(world: World, body: Callable[[], int]) -> int:
    """Run `body` and return its exit code; a user's error becomes code 2.

    The other ranks, which write to logs of their own, say who they are and when it was: the first to fail is to blame.
    """
    try:
        return body()
    except Exception as e:
        refused = isinstance(e, StamoError)
        if not (refused and world.is_main):
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            print(f"rank {world.rank} of {world.size} failed at {now}:", file=sys.stderr)
        print(f"error: {e}" if refused else traceback.format_exc(), file=sys.stderr)
        return 2 if refused else 1


def leave(code: int) -> None:
    """End this process without running interpreter finalisers.

    gloo's threads abort a finished process at interpreter exit about one time in ten, which would turn a finished run
    into a failed one.
    """
    if code in (0, EXIT_PREEMPTED) and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
