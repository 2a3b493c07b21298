"""A GPU that is none: what `Gpu` asks of torch.cuda is answered and counted here, and its tensors lie in host memory.

Copies on a stream of their own begin with memory full of 77 and are made when the stream is waited for, so who does not
wait reads that; an event has passed once somebody waited for it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from stamo_dist.device import Gpu

PENDING = 77


class FakeStream:
    """Work that was handed out and is not done."""

    def __init__(self, cuda: FakeCuda, device: object = None):
        cuda.said["Stream"] += 1
        self._cuda, self.work = cuda, deque[Callable[[], object]]()

    def wait_event(self, event: FakeEvent) -> None:
        self._cuda.said["wait_event"] += 1
        event.catch_up()

    def run(self) -> None:
        while self.work:
            self.work.popleft()()


class FakeEvent:
    def __init__(self, cuda: FakeCuda, enable_timing: bool = False):
        cuda.said["Event"] += 1
        self._cuda, self._timed, self._passed = cuda, enable_timing, False
        self._stream: FakeStream | None = None
        self._time = 0.0

    def record(self, stream: FakeStream | None = None) -> None:
        self._cuda.said["record"] += 1
        self._stream, self._passed, self._time = stream or self._cuda.current_stream(), False, time.perf_counter()

    def catch_up(self) -> None:
        assert self._stream is not None, "it was never recorded"
        self._stream.run()
        self._passed = True

    def synchronize(self) -> None:
        self._cuda.said["Event.synchronize"] += 1
        self.catch_up()

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self._timed, "made without enable_timing"
        assert end._timed, "made without enable_timing"
        assert end._passed, "device not ready: nobody waited for the event"
        return 1e3 * (end._time - self._time)


class FakeCuda:
    """What `Gpu` uses of torch.cuda; `said` counts the calls."""

    def __init__(self, name: str = "NVIDIA H100 80GB HBM3", count: int = 8):
        self.said, self._name, self._count = Counter[str](), name, count
        self.modes: list[str | int] = []
        self.selected: list[int] = []
        self.compute = FakeStream(self)  # of every thread, until it enters another
        self._entered = threading.local()
        self.said.clear()
        self.memory = SimpleNamespace(_record_memory_history=self._record, _dump_snapshot=self._dump)

    def device_count(self) -> int:
        return self._count

    def current_device(self) -> int:
        return self.selected[-1] if self.selected else 0

    def set_device(self, device: int) -> None:
        assert 0 <= device < self._count
        self.selected.append(device)

    def get_device_name(self, device: object = None) -> str:
        return self._name

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return including_emulation or "V100" not in self._name

    def Stream(self, device: object = None) -> FakeStream:  # noqa: N802
        return FakeStream(self, device)

    def Event(self, enable_timing: bool = False) -> FakeEvent:  # noqa: N802
        return FakeEvent(self, enable_timing)

    def current_stream(self, device: object = None) -> FakeStream:
        stream: FakeStream = getattr(self._entered, "stream", self.compute)
        return stream

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self._entered.stream = stream
        yield
        del self._entered.stream

    def synchronize(self, device: object = None) -> None:
        self.said["synchronize"] += 1
        self.compute.run()

    def max_memory_allocated(self, device: object = None) -> int:
        return 3_000_000_000

    def max_memory_reserved(self, device: object = None) -> int:
        return 4_000_000_000

    def reset_peak_memory_stats(self, device: object = None) -> None:
        self.said["reset_peak_memory_stats"] += 1

    def utilization(self, device: object = None) -> int:
        return 87

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return 70_000_000_000, 80_000_000_000

    def empty_cache(self) -> None:
        self.said["empty_cache"] += 1

    def set_sync_debug_mode(self, debug_mode: str | int) -> None:
        self.modes.append(debug_mode)

    def get_sync_debug_mode(self) -> int:
        return {"default": 0, "warn": 1, "error": 2}.get(mode, mode) if (mode := (self.modes or [0])[-1]) else 0

    def _record(self, enabled: str | None = "all", max_entries: int = 0) -> None:
        self.said[f"memory {'off' if enabled is None else 'on'}"] += 1

    def _dump(self, filename: str) -> None:
        Path(filename).write_bytes(b"snapshot")


class FakeGpu(Gpu):
    """A GPU's every branch on a CPU; only what needs real page-locked or device memory is other than in `Gpu`."""

    backend = "gloo"

    def __init__(self, **options: Any):
        super().__init__("cpu")
        self.cuda = self._cuda = FakeCuda(**options)
        self.pinned: set[int] = set()

    @property
    def activities(self) -> list[ProfilerActivity]:
        assert ProfilerActivity.CUDA in super().activities
        return [ProfilerActivity.CPU]

    def select(self, number: int) -> None:
        super().select(number)
        assert self.torch_device == torch.device("cuda", number % 8)
        self.torch_device = torch.device("cpu")

    def pin(self, tensor: Tensor) -> Tensor:
        self.cuda.said["pin"] += 1
        return self._pinned(tensor.clone())

    def host_like(self, tensor: Tensor) -> Tensor:
        self.cuda.said["pin"] += 1
        return self._pinned(torch.empty_like(tensor))

    def _pinned(self, tensor: Tensor) -> Tensor:
        self.pinned.add(tensor.data_ptr())
        return tensor

    def _copy(self, tensor: Tensor) -> Tensor:
        assert tensor.data_ptr() in self.pinned, "a copy from pageable memory makes the host wait"
        there = torch.full_like(tensor, PENDING)
        self.cuda.current_stream().work.append(lambda: there.copy_(tensor))
        return there

    def _lend(self, tensor: Tensor, stream: FakeStream) -> None:
        assert stream is self.cuda.compute, "lent to another stream than the one that computes"
        self.cuda.said["record_stream"] += 1
