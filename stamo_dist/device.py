"""What a process computes on: whatever is asked of a GPU, and differs on a CPU, is asked here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from stamo_dist.errors import RunError

_ALLOCATIONS = 200_000  # that a snapshot of the memory keeps
#: Dense bf16 peak in FLOP/s, by a part of the device's name; of two that fit, the first counts.
PEAK_FLOPS = {
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12,
}  # fmt: skip


class DeviceEvent(Protocol):
    """A moment in what a device does."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class Device:
    """The host's processors, on which everything is done when the call returns. `Gpu` is the other kind.

    Attributes:
        torch_device: Where its tensors lie.
        is_gpu: Whether the host only hands out work, and goes on before it is done.
        backend: Of the process group that its tensors are reduced in.
    """

    is_gpu = False
    backend = "gloo"

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    @staticmethod
    def current() -> Device:
        """That of this process: a GPU where PyTorch sees one."""
        global _current
        if _current is None:
            _current = Gpu() if torch.cuda.is_available() else Device()
        return _current

    @staticmethod
    def named(name: str | None) -> Device:
        """`cpu`, `cuda` or `cuda:1`; that of this process when omitted.

        Raises:
            RunError: There is none of this name here.
        """
        current = Device.current()
        if name in (None, str(current.torch_device)):
            return current
        if name == "cpu":
            return CPU
        kind, _, number = str(name).partition(":")
        there = len(current.all_names)
        if kind != "cuda" or (number and not number.isdigit()) or int(number or 0) >= there:
            raise RunError(f"device {name}: this machine has cpu" + f" and {there} × cuda" * bool(there))
        return Gpu(str(name))

    @property
    def name(self) -> str:
        return f"CPU, {torch.get_num_threads()} thread(s)"

    @property
    def all_names(self) -> list[str]:
        """Of the GPUs of this machine that the process may use."""
        return []

    @property
    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s; None where they are not known."""
        return None

    @property
    def capacity(self) -> float | None:
        """Bytes of the GPU's memory; None on a CPU."""
        return None

    @property
    def number(self) -> int:
        """Among those of the machine that the process may use."""
        return 0

    def number_of(self, local_rank: int) -> int:
        """The number of the device of a node's process: another where a scheduler shows each process its own alone."""
        return local_rank

    def select(self, number: int) -> None:
        """In the calling thread, use the GPU of this number: the process's on its node, or `number`."""

    def tune(self, precision: str) -> list[str]:
        """Set up arithmetic and memory; before the device is first used. Returns what a person should know."""
        return []

    def allow_tf32(self, allowed: bool) -> None:
        """Whether products and convolutions of fp32 may be computed in TF32, which a CPU does not have."""

    def dtype(self, precision: str = "bf16") -> torch.dtype:
        """That of weights which are not trained: the recipe's precision where the device is made for it."""
        return torch.float32

    def synchronize(self) -> None:
        """Wait until all that was handed out is done."""

    def event(self) -> DeviceEvent | None:
        """A recorded moment of what is handed out here; None where the host's clock tells as much."""
        return None

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in page-locked memory, from which a GPU copies while the host goes on."""
        return tensor

    def host_like(self, tensor: Tensor) -> Tensor:
        """Memory of the host for a copy of `tensor`, page-locked where `tensor` lies on a GPU."""
        return torch.empty_like(tensor, device="cpu")

    def send(self, tensors: Mapping[str, Tensor]) -> Sent | None:
        """Begin to copy pinned tensors to the device, beside what it is doing; None where there is nothing to copy."""
        return None

    def upload(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor of the host on the device; the host does not wait for it."""
        return self.pin(tensor).to(self.torch_device, non_blocking=True)

    def fetch(self, tensor: Tensor) -> Fetched:
        """Begin to copy a tensor of the device to the host."""
        return Fetched(tensor, None)

    def peak_memory(self) -> tuple[float, float]:
        """Bytes that the allocator had in use at most, and held, since it was last asked; 0 on a CPU."""
        return 0.0, 0.0

    def use(self) -> float | None:
        """Share of the device's time in use, as its driver says; None on a CPU, or without the driver's library."""
        return None

    def release_memory(self) -> None:
        """Give back what the allocator holds unused, and count the peak from here."""

    @property
    def activities(self) -> list[ProfilerActivity]:
        """What a trace records."""
        return [ProfilerActivity.CPU]

    def record_memory(self, on: bool) -> None:
        """Keep the stack of each allocation from now on, or no longer."""

    def dump_memory(self, file: Path) -> None:
        """Write what `record_memory` kept.

        Raises:
            OSError: It cannot be written.
        """

    def watch_waits(self, mode: str) -> None:
        """Have PyTorch let pass ("default"), "warn" of or refuse ("error") what makes the host wait."""

    @contextmanager
    def meant_wait(self) -> Iterator[None]:
        """Inside the host may wait, whatever `watch_waits` said."""
        yield


class Gpu(Device):
    """A CUDA device; without a number the one that PyTorch has selected, at first 0."""

    is_gpu = True
    backend = "nccl"
    _cuda: Any = torch.cuda

    def __init__(self, name: str = "cuda") -> None:
        self.torch_device = torch.device(name)
        self._copies: Any = None

    @property
    def name(self) -> str:
        return str(self._cuda.get_device_name(self.torch_device))

    @property
    def all_names(self) -> list[str]:
        return [self._cuda.get_device_name(i) for i in range(self._cuda.device_count())]

    @property
    def peak_flops(self) -> float | None:
        return next((peak for part, peak in PEAK_FLOPS.items() if part in self.name), None)

    @property
    def capacity(self) -> float:
        return float(self._cuda.mem_get_info(self.torch_device)[1])

    @property
    def number(self) -> int:
        index = self.torch_device.index
        return int(self._cuda.current_device()) if index is None else index

    def number_of(self, local_rank: int) -> int:
        return local_rank % int(self._cuda.device_count())

    def select(self, number: int) -> None:
        number = self.number_of(number)
        self._cuda.set_device(number)
        self.torch_device = torch.device("cuda", number)

    def tune(self, precision: str) -> list[str]:
        # Not cudnn.benchmark: each start might choose other kernels.
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():  # the second one wins in PyTorch
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        # Of fp32 side work, such as a frozen compressor's; PyTorch by itself allows it in convolutions alone.
        self.allow_tf32(precision == "bf16")
        if precision != "bf16":
            return []
        if self._cuda.is_bf16_supported(including_emulation=False):
            return []
        return [f"train.precision: {self.name} emulates bf16, which is slow; it has fp32"]

    def allow_tf32(self, allowed: bool) -> None:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed

    def dtype(self, precision: str = "bf16") -> torch.dtype:
        return torch.bfloat16 if precision == "bf16" else torch.float32

    def synchronize(self) -> None:
        self._cuda.synchronize(self.torch_device)

    def event(self) -> DeviceEvent:
        event: DeviceEvent = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)

    def send(self, tensors: Mapping[str, Tensor]) -> Sent:
        if self._copies is None:
            self._copies = self._cuda.Stream(self.torch_device)
        with self._cuda.stream(self._copies):
            there = {name: self._copy(tensor) for name, tensor in tensors.items()}
            arrived = self._cuda.Event()
            arrived.record(self._copies)
        return Sent(self, there, arrived)

    def fetch(self, tensor: Tensor) -> Fetched:
        host = self.host_like(tensor).copy_(tensor, non_blocking=True)
        return Fetched(host, self.event())

    def receive(self, tensors: dict[str, Tensor], arrived: Any) -> None:
        """Have what is handed out from now on wait for copies that `send` began."""
        stream = self._cuda.current_stream(self.torch_device)
        stream.wait_event(arrived)
        for tensor in tensors.values():
            # Their memory is of the stream that copied, which must not take it back while this one reads.
            self._lend(tensor, stream)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.torch_device, non_blocking=True)

    def _lend(self, tensor: Tensor, stream: Any) -> None:
        tensor.record_stream(stream)

    def peak_memory(self) -> tuple[float, float]:
        found = (
            self._cuda.max_memory_allocated(self.torch_device),
            self._cuda.max_memory_reserved(self.torch_device),
        )
        self._cuda.reset_peak_memory_stats(self.torch_device)
        return float(found[0]), float(found[1])

    def use(self) -> float | None:
        try:
            return float(self._cuda.utilization(self.torch_device)) / 100
        except Exception:  # nvidia-ml-py is missing, or raises an error of its own: no metric ends a run
            return None

    def release_memory(self) -> None:
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats(self.torch_device)

    @property
    def activities(self) -> list[ProfilerActivity]:
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]

    def record_memory(self, on: bool) -> None:
        if on:
            self._cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        else:
            self._cuda.memory._record_memory_history(enabled=None)

    def dump_memory(self, file: Path) -> None:
        self._cuda.memory._dump_snapshot(str(file))

    def watch_waits(self, mode: str) -> None:
        self._cuda.set_sync_debug_mode(mode)

    @contextmanager
    def meant_wait(self) -> Iterator[None]:
        if not (watched := self._cuda.get_sync_debug_mode()):
            yield
            return
        self._cuda.set_sync_debug_mode("default")
        try:
            yield
        finally:
            self._cuda.set_sync_debug_mode(watched)


@dataclass(frozen=True)
class Fetched:
    """A tensor on its way to the host."""

    tensor: Tensor
    arrived: DeviceEvent | None

    def wait(self) -> Tensor:
        """The tensor, once it is there; for what was handed out after it nobody waits."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor


@dataclass(frozen=True)
class Sent:
    """Tensors on their way to a GPU."""

    device: Gpu
    tensors: dict[str, Tensor]
    arrived: Any

    def receive(self) -> dict[str, Tensor]:
        """The tensors, for what is handed out from now on in this thread; the host does not wait for them."""
        self.device.receive(self.tensors, self.arrived)
        return self.tensors


CPU = Device()
_current: Device | None = None
