"""Collective operations of a run's processes, and leaving the process group in order."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from stamo_dist.device import Device
from stamo_dist.distributed.rank import World
from stamo_dist.errors import RunError, StamoError
from stamo_dist.exit_codes import EXIT_NOT_EXPORTED, EXIT_PREEMPTED

#: Timeout (s) of collectives while one rank may work alone for long: before the first step, and while exporting.
PATIENCE = 7200.0
#: Seconds that a rank waits for the others at the end.
_LEAVING = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")
_stores: list[dist.TCPStore] = []  # rank 0's store must live until the process group has its own


def set_timeout(seconds: float) -> None:
    """Set the timeout of collectives of all process groups from now on."""
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


def before_connecting(world: World, name: str, body: Callable[[], T]) -> T:
    """The value of `body` on rank 0, returned on every rank; a JSON value; needs no process group.

    Rank 0 does not wait. Each `name` may be used once.
    """
    if world.size == 1:
        return body()
    env, by_launcher = os.environ, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        world.size,
        is_master=world.is_main and not by_launcher,
        timeout=timedelta(seconds=PATIENCE),
        wait_for_workers=False,
        multi_tenant=True,  # the process group uses the same store
    )
    _stores.append(store)
    if world.is_main:
        store.set(f"stamo/{name}", json.dumps(body()))
    value: T = json.loads(store.get(f"stamo/{name}"))
    return value


def on_main(world: World, body: Callable[[], T]) -> T:
    """The value or exception of `body` on rank 0, on every rank."""
    result: T | StamoError | None = None
    if world.is_main:
        try:
            result = body()
        except StamoError as e:
            result = e
    result = broadcast(result)
    if isinstance(result, StamoError):
        raise result
    return result  # type: ignore[return-value]


def everywhere(flag: bool) -> bool:
    """Whether the flag is true on every rank."""
    if not dist.is_initialized():
        return flag
    least = torch.tensor(int(flag), device=Device.current().torch_device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return bool(least.item())


def gather(value: T) -> list[T] | None:
    """Every rank's value, on rank 0; None elsewhere."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def scatter(values: list[T] | None) -> T:
    """Send each rank its own item of rank 0's values."""
    if not dist.is_initialized():
        assert values is not None, "the only process is rank 0"
        return values[0]
    box: list[Any] = [None]
    dist.scatter_object_list(box, values, src=0)
    value: T = box[0]
    return value


def part() -> None:
    """Leave the process group once all ranks have arrived: from now on none waits for another."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # as in `leave`
            dist.barrier()
            dist.destroy_process_group()


def run_rank(world: World, body: Callable[[], int]) -> int:
    """Run `body` and return its exit code; a user's error becomes code 2.

    Other ranks, which write to their own logs, add rank and time, so that the first failure can be found.
    """
    try:
        return body()
    except Exception as e:
        if isinstance(e, OSError) and e.errno in _FULL:
            e = RunError(f"{e.filename or 'the disk'}: {e.strerror}; make room and start again")
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
    late = threading.Timer(_LEAVING, os._exit, (code,))  # in case a peer hangs or has died
    late.daemon = True
    late.start()
    if code in (0, EXIT_PREEMPTED, EXIT_NOT_EXPORTED) and dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a rank killed now does not affect the result
            dist.barrier()
            dist.destroy_process_group()
    Device.current().synchronize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
