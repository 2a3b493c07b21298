"""What is made ahead of its use, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from stamo_dist.device import CPU, Device

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `make` in a thread; what it raises, `take` raises after the batches made before.

    `depth` batches wait for `take`, while one more is being made.
    """

    def __init__(self, make: Callable[[], T], device: Device = CPU, depth: int = 2):
        self._make, self._device, self._number = make, device, device.number
        self._made: queue.Queue[T | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetcher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._device.select(self._number)  # a new thread begins on the first GPU, and would make a context there
        made: T | BaseException | None = None
        while not isinstance(made, BaseException):
            try:
                made = self._make()
            except BaseException as e:
                made = e
            while True:
                if self._closed.is_set():
                    return
                with suppress(queue.Full):
                    self._made.put(made, timeout=1)
                    break

    def take(self) -> T:
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """End the thread; while it waits for data it is left to end by itself."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:
                self._made.get_nowait()
        self._thread.join(timeout=5)
