"""What the processes of one run do together, and how one leaves in an orderly way."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from stamo_dist.engine.preempt import EXIT_PREEMPTED
from stamo_dist.engine.world import World
from stamo_dist.errors import StamoError

#: Seconds that collectives wait where one rank may work alone for long: before the first step, and while exporting.
PATIENCE = 7200.0
T = TypeVar("T")


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
    """Run `body` and return its exit code; a user's error is printed once, by rank 0, and becomes code 2."""
    try:
        return body()
    except StamoError as e:
        if world.is_main:
            print(f"error: {e}", file=sys.stderr)
        return 2
    except Exception:
        print(f"rank {world.rank} of {world.size} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return 1


def leave(code: int) -> None:
    """End this process without running interpreter finalisers.

    gloo's threads abort a finished process at interpreter exit about one time in ten, which would turn a finished run
    into a failed one.
    """
    if code in (0, EXIT_PREEMPTED) and dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a rank that was killed by now changes nothing about what was done
            dist.barrier()
            dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
