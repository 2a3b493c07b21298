"""Several processes that measure together: each takes its share of the parts, and all get every result."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from stamo_dist.engine.processes import barrier, leave, run_rank
from stamo_dist.engine.world import world_from_environment

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Crew:
    """This process among those that measure; a lone one when nothing is said."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """The one that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T], measure: Callable[[T], S]) -> list[S]:
        """`measure` of every item, in their order; each process measures every `size`-th.

        What is measured must not depend on the process, so that the result does not depend on their number.
        """
        mine = {i: measure(items[i]) for i in range(self.rank, len(items), self.size)}
        if self.size == 1:
            return list(mine.values())
        shares: list[dict[int, S]] = [{} for _ in range(self.size)]
        dist.all_gather_object(shares, mine)
        found = {i: value for share in shares for i, value in share.items()}
        return [found[i] for i in range(len(items))]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            barrier()

    def console(self, console: Console | None) -> Console:
        """`console`, or the terminal; the others' goes nowhere."""
        return (console or Console()) if self.main else Console(file=io.StringIO())


def run_crew(run: Path, nproc: int, launch: Callable[[list[str], int, Path], int], body: Callable[[Crew], object],
             arguments: list[str]) -> None:  # fmt: skip
    """Run `body` here, or where several processes are asked for on each of them; does not return from those.

    Under torchrun or Slurm each process takes its rank from the environment; otherwise `launch` starts `nproc`
    processes with `arguments`.
    """
    if "RANK" not in os.environ:
        if nproc == 1:
            body(Crew())
            return
        raise SystemExit(launch(arguments, nproc, run))
    world = world_from_environment()

    def rank() -> int:
        if torch.cuda.is_available():
            torch.cuda.set_device(world.local_rank)
        if world.size > 1:
            dist.init_process_group("gloo", rank=world.rank, world_size=world.size)
        body(Crew(world.rank, world.size))
        return 0

    leave(run_rank(world, rank))
