"""Running a function on every shard of a source in processes, with results in shard order."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import TypeVar

from data_tools.look.columns import INDEX, IndexedShard, read_index
from data_tools.stores.open import open_store
from data_tools.stores.store import Advance, Store
from data_tools.workers import spawned, usable_cores
from stamo_dist.data.agreement import check_content, disagreements
from stamo_dist.data.schema import REPAIR, Manifest
from stamo_dist.errors import DataError

#: Use one process more per so many bytes, as starting one takes a second.
BYTES_WORTH_A_PROCESS = 1 << 28

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

#: Stores are cached per process, and with them the S3 client.
store_at = lru_cache(maxsize=8)(open_store)


def index_name(split: str, camera: str) -> str:
    return f"{split}/{camera}/{INDEX}"


def shards_of(store: Store, split: str, camera: str) -> list[IndexedShard]:
    """The shards of one camera in stored order.

    Raises:
        DataError: Its index.json is missing or broken.
    """
    name = index_name(split, camera)
    return read_index(store.read(name), f"{store.url}/{name}")


def agreed_shards(store: Store, manifest: Manifest, split: str, camera: str) -> list[IndexedShard]:
    """As `shards_of`, and those of the manifest.

    Raises:
        DataError: Its index.json is missing or broken, or names other shards than the manifest.
    """
    name = index_name(split, camera)
    where, content = f"{store.url}/{name}", store.read(name)
    check_content(content, name, manifest, where)
    shards, frames = read_index(content, where), manifest.splits[split].frames
    counts = list(accumulate(shard.samples for shard in shards))
    shards = shards[: counts.index(frames) + 1] if frames in counts else shards  # later ones are of a growth
    if problems := disagreements(((s.name, s.sha256) for s in shards), manifest, split, camera):
        raise DataError("\n".join(f"{where}: {problem}; {REPAIR}" for problem in problems))
    return shards


def processes_for(nbytes: int, asked: int | None) -> int:
    """How many processes to use on so many bytes."""
    return asked or min(usable_cores(), 1 + nbytes // BYTES_WORTH_A_PROCESS)


def in_order(function: Callable[[_Task], _Result], tasks: Iterable[_Task], processes: int) -> Iterator[_Result]:
    """Yield `function(task)` in order; only a few results are held in memory.

    Args:
        function: Must be importable, so that it can be sent to a process.
        tasks: Consumed as needed.
        processes: 1: in this process.

    Raises:
        DataError: A process died.
    """
    if processes <= 1:
        yield from map(function, tasks)
        return
    with spawned(processes, _ready) as pool:
        waiting: deque[Future[_Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > 3 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as e:
            raise DataError("a process died (out of memory?); run again with fewer --processes") from e


@contextmanager
def frames_bar(title: str, total: int, quiet: bool) -> Iterator[Advance]:
    """A progress bar over frames; yields what advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("frames · ETA"), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=quiet) as bar:
        line = bar.add_task(title, total=total)
        yield lambda frames: bar.update(line, advance=frames)


def _ready() -> None:
    pass
