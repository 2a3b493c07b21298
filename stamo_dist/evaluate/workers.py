"""Parts of a measurement: stored on disk, so that a killed one resumes, and shared by processes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from rich.console import Console

from stamo_dist.device import Device
from stamo_dist.distributed.collectives import barrier, broadcast, leave, run_rank
from stamo_dist.distributed.rank import world_from_environment
from stamo_dist.run.folder import write_atomic

T = TypeVar("T")
S = TypeVar("S")


class PartsFile:
    """A file with one JSON line per part, after a line with their `identity` (weights, data, settings).

    Every process writes its own file and reads those of all. Parts of another identity are deleted.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], rank: int = 0):
        self._head = json.dumps(identity, sort_keys=True, default=str)
        self._path = path.with_suffix(f".{rank}{path.suffix}") if rank else path
        self._main = not rank
        self._all = lambda: (path, *path.parent.glob(f"{path.stem}.*{path.suffix}"))
        self._done = dict[str, Any]()
        for file in self._all():
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            head, *lines = file.read_text().splitlines()
        except (FileNotFoundError, ValueError):  # the first process has removed it, or it is empty
            return
        if head != self._head:
            if self._main:
                file.unlink()
            return
        for line in lines:
            try:
                part = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            self._done[part["part"]] = part["value"]

    def known(self, parts: Iterable[str]) -> dict[str, Any]:
        """Values of the measured ones of `parts`."""
        return {part: self._done[part] for part in parts if part in self._done}

    def get(self, part: str, measure: Callable[[], Any]) -> Any:
        """The JSON value that an earlier start measured, or that `measure` returns now."""
        if part not in self._done:
            self._done[part] = value = measure()
            if not self._path.is_file():
                write_atomic(self._path, self._head + "\n")
            with self._path.open("a") as f:
                f.write("\n" + json.dumps({"part": part, "value": value}))
        return self._done[part]

    def close(self) -> None:
        """Call when all parts are in the result: the first process removes all files."""
        for file in self._all() if self._main else ():
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class WorkerGroup:
    """The processes of one measurement, as seen by rank `rank`; by default only this one."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T], measure: Callable[[T], S]) -> list[S]:
        """`measure` of every item, in order, on all processes; each process computes every `size`-th.

        The value of an item must not depend on the process, so that the result does not depend on `size`.
        """
        mine = {i: measure(items[i]) for i in range(self.rank, len(items), self.size)}
        if self.size == 1:
            return list(mine.values())
        shares: list[dict[int, S]] = [{} for _ in range(self.size)]
        dist.all_gather_object(shares, mine)
        found = {i: value for share in shares for i, value in share.items()}
        return [found[i] for i in range(len(items))]

    def open_parts(self, path: Path, identity: Mapping[str, Any]) -> PartsFile:
        """The values of earlier starts; all processes have read them before any is added."""
        finished = PartsFile(path, identity, self.rank)
        self.wait()
        return finished

    def map(self, finished: PartsFile, parts: Mapping[str, T], measure: Callable[[T], S]) -> Iterator[dict[str, S]]:
        """`measure` the `parts` that `finished` lacks, `size` at a time, and store their values in it.

        Yields name → value of all parts so far, in the order of `parts`, on every process: after each round, and once
        if nothing is missing. The next round begins when all processes request it.
        """
        known = finished.known(parts)
        done: dict[str, S] = broadcast(known) if self.size > 1 else known
        missing = [name for name in parts if name not in done]
        if not missing:
            yield done
        for first in range(0, len(missing), self.size):
            names = missing[first : first + self.size]
            found = self.share(names, lambda name: finished.get(name, lambda: measure(parts[name])))
            done |= dict(zip(names, found, strict=True))
            yield {name: done[name] for name in parts if name in done}
            self.wait()

    def wait(self) -> None:
        """Wait until all processes have arrived."""
        if self.size > 1:
            barrier()

    def console(self, console: Console | None) -> Console:
        """`console`, or the terminal; on other processes one that prints nothing."""
        return (console or Console()) if self.main else Console(file=io.StringIO())


def run_in_group(
    run: Path,
    nproc: int,
    launch: Callable[[list[str], int, Path], int],
    body: Callable[[WorkerGroup], object],
    arguments: list[str],
) -> None:
    """Run `body` here, or on several processes; in the latter case it does not return.

    Under torchrun or Slurm each process takes its rank from the environment; otherwise `launch` starts `nproc`
    processes with `arguments`.
    """
    if "RANK" not in os.environ:
        if nproc == 1:
            body(WorkerGroup())
            return
        raise SystemExit(launch(arguments, nproc, run))
    world = world_from_environment()

    def rank() -> int:
        Device.current().select(world.local_rank)
        if world.size > 1:
            dist.init_process_group("gloo", rank=world.rank, world_size=world.size)
        body(WorkerGroup(world.rank, world.size))
        return 0

    leave(run_rank(world, rank))
