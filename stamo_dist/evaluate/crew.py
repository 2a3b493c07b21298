"""Several processes that measure together: each takes its share of the parts, and all get every result."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console

from stamo_dist.distributed.collectives import barrier, broadcast, leave, run_rank
from stamo_dist.distributed.rank import world_from_environment
from stamo_dist.evaluate.common import Trials

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

    def trials(self, folder: Path, name: str, identity: Mapping[str, Any]) -> Trials:
        """The parts of a measurement; all processes have read those of earlier starts before one is added."""
        trials = Trials(folder / f"{name}.parts.jsonl", identity, self.rank)
        self.wait()
        return trials

    def rounds(
        self, trials: Trials, parts: Mapping[str, T], measure: Callable[[T], S], tell: Callable[[dict[str, S]], None]
    ) -> None:
        """`measure` the `parts`, by name, that `trials` doesn't know; `tell` hears after each round of all there are.

        All processes hear the same, in the order of `parts`, and go on when all have heard.
        """
        known = trials.known(parts)
        done: dict[str, S] = broadcast(known) if self.size > 1 else known
        missing = [name for name in parts if name not in done]
        if not missing:
            tell(done)
        for first in range(0, len(missing), self.size):
            these = missing[first : first + self.size]
            found = self.share(these, lambda name: trials.get(name, lambda: measure(parts[name])))
            done |= dict(zip(these, found, strict=True))
            tell({name: done[name] for name in parts if name in done})
            self.wait()

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
