"""The device: every line that only a GPU runs is run here on a fake one, and none asks torch.cuda by itself."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import cast
from unittest.mock import Mock

import pytest
import torch
from fake_gpu import PENDING, FakeCuda, FakeGpu

from stamo_dist import device as devices
from stamo_dist.checkpoint.manifest import Stored
from stamo_dist.checkpoint.staging import Staging
from stamo_dist.checkpoint.state_writer import StateWriter
from stamo_dist.data.loader import Batch, Cursor
from stamo_dist.data.prefetcher import Prefetcher
from stamo_dist.device import CPU, Device
from stamo_dist.distributed import strategies
from stamo_dist.distributed.engine import Phase
from stamo_dist.distributed.ranges import WEIGHT, Range
from stamo_dist.distributed.rank import World, reserve_port
from stamo_dist.errors import RunError
from stamo_dist.optim.optimizer import adamw
from stamo_dist.recipe.batching import Batching
from stamo_dist.recipe.training import Optimizer, ProfileSettings
from stamo_dist.run.folder import environment
from stamo_dist.run.state import RunState
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.tracking.metrics import Reducer, StepSums, StepTimes, Stopwatch
from stamo_dist.tracking.system import SystemUse
from stamo_dist.training.profiling import ProfileHook, SyncGuardHook
from stamo_dist.training.trainer import StepResult

ROOT = Path(__file__).resolve().parents[2]
#: Where torch.cuda may be asked, and why.
ALLOWED = {"stamo_dist/device.py": "it is asked there so that it is nowhere else"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(devices, "_current", fake)
    return fake


def test_how_busy_the_gpu_is(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SystemUse(tmp_path).look()["system/gpu"] == 0.87
    for error in (ModuleNotFoundError("pynvml"), Exception("NVML Shared Library Not Found")):
        monkeypatch.setattr(gpu.cuda, "utilization", Mock(side_effect=error))
        assert "system/gpu" not in SystemUse(tmp_path).look()
    monkeypatch.setattr(devices, "_current", CPU)
    assert "system/gpu" not in SystemUse(tmp_path).look()


def test_nobody_else_asks_torch_cuda() -> None:
    asks = re.compile(r"torch\.cuda\b|\.is_cuda\b|\.type [=!]= \"cuda\"|from torch import cuda|\bpin_memory\b")
    found = {
        f"{path.relative_to(ROOT)}:{number}": line.strip()
        for package in ("stamo_dist", "data_tools", "benchmarks")
        for path in sorted((ROOT / package).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in ALLOWED
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if asks.search(line)
    }
    assert not found, "ask stamo_dist.device instead"


def test_the_fake_is_asked_as_pytorch_would_be() -> None:
    """Each name of the fake is one of torch.cuda, and takes no argument that the real one does not."""
    fake = FakeCuda()
    for name, ours in inspect.getmembers(fake, inspect.ismethod):
        if name.startswith("_"):
            continue
        real = getattr(torch.cuda, name)
        wanted = inspect.signature(real.__new__ if inspect.isclass(real) else real).parameters
        for argument in inspect.signature(ours).parameters:
            assert argument in wanted, f"torch.cuda.{name} has no argument {argument}"
    assert "max_entries" in inspect.signature(torch.cuda.memory._record_memory_history).parameters
    assert "filename" in inspect.signature(torch.cuda.memory._dump_snapshot).parameters
    for kind, used in ((torch.cuda.Stream, ("wait_event",)), (torch.cuda.Event, ("record", "synchronize"))):
        assert all(callable(getattr(kind, name)) for name in (*used, *(("elapsed_time",) * (kind is torch.cuda.Event))))


def test_names_and_numbers(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (gpu.name, gpu.peak_flops, gpu.dtype(), gpu.dtype("fp32")) == (
        "NVIDIA H100 80GB HBM3", 989e12, torch.bfloat16, torch.float32,
    )  # fmt: skip
    assert environment([])["gpus"] == [gpu.name] * 8
    gpu.select(11)
    assert (gpu.number, gpu.cuda.selected) == (3, [3]), "of a node's fourth process, where a node has eight"
    assert [FakeGpu(count=1).number_of(3), gpu.number_of(3), CPU.number_of(3)] == [0, 3, 3]
    assert (gpu.capacity, CPU.capacity) == (80e9, None)
    gpu.release_memory()
    assert (gpu.cuda.said["empty_cache"], gpu.cuda.said["reset_peak_memory_stats"]) == (1, 1)
    assert str(Device.named("cuda:5").torch_device) == "cuda:5"
    assert Device.named("cuda:5").number == 5
    assert Device.named(None) is gpu
    for wrong in ("cuda:8", "gpu", "cuda:x"):
        with pytest.raises(RunError, match=f"device {wrong}: this machine has cpu and 8 × cuda"):
            Device.named(wrong)
    for name, peak in {"NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "Tesla V100": None}.items():
        assert FakeGpu(name=name).peak_flops == peak
    monkeypatch.setattr(devices, "_current", None)
    assert Device.current().is_gpu is torch.cuda.is_available()
    assert Device.current() is Device.current()
    with pytest.raises(RunError, match=r"device tpu: this machine has cpu"):
        Device.named("tpu")
    assert (CPU.name, CPU.peak_flops, CPU.all_names, CPU.dtype()) == (
        f"CPU, {torch.get_num_threads()} thread(s)", None, [], torch.float32,
    )  # fmt: skip


def test_arithmetic_is_set_up(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True  # as PyTorch sets it
    try:
        assert gpu.tune("fp32") == []
        assert torch.get_float32_matmul_precision() == before, "fp32 means fp32"
        assert not torch.backends.cudnn.allow_tf32, "in convolutions, too"
        assert gpu.tune("bf16") == []
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        gpu.allow_tf32(False)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        (note,) = FakeGpu(name="Tesla V100").tune("bf16")
        assert note == "train.precision: Tesla V100 emulates bf16, which is slow; it has fp32"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = True
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    FakeGpu().tune("fp32")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ, "PyTorch would prefer it to what the user says"
    batching = Batching(world_size=1, per_rank=1, micro_batch=1, accumulation=1)
    assert strategies._deepspeed_config(2, batching, 1.0, "bf16")["zero_optimization"]["overlap_comm"] is True
    optimizer = adamw(torch.nn.Linear(2, 2), Optimizer())
    assert optimizer.defaults["fused"] is True


def batch(value: int) -> Batch:
    images = torch.full((2, 4, 4, 3), value, dtype=torch.uint8)
    return Batch(images, torch.arange(2), torch.zeros(2, dtype=torch.int64), Cursor(value))


def test_a_batch_is_sent_ahead_and_waited_for_on_the_device(gpu: FakeGpu) -> None:
    sent = batch(1).send(gpu)
    assert (gpu.cuda.said["pin"], gpu.cuda.said["Stream"]) == (3, 1)
    assert sent.sent is not None
    there = sent.sent.tensors["images"]
    assert (there == PENDING).all(), "nobody waited for the copy yet"
    assert (sent.images == 1).all(), "the host's is there, for pictures and checksums"
    assert gpu.cuda.said["synchronize"] == gpu.cuda.said["Event.synchronize"] == 0
    arrived = sent.to(gpu.torch_device)
    assert arrived.images is there
    assert (there == 1).all()
    assert arrived.sent is None
    assert arrived.cursor == Cursor(1)
    assert (gpu.cuda.said["wait_event"], gpu.cuda.said["record_stream"]) == (1, 3)
    assert gpu.cuda.said["synchronize"] == gpu.cuda.said["Event.synchronize"] == 0, "the host waited"
    assert [len(part) for part in arrived.split(1)] == [1, 1]
    batch(2).send(gpu)
    assert gpu.cuda.said["Stream"] == 1, "one stream for all"


def test_copies_run_ahead_in_a_thread(gpu: FakeGpu) -> None:
    gpu.select(3)
    left = iter(range(5))
    ahead = Prefetcher(lambda: batch(next(left)).send(gpu), gpu)
    for value in range(5):
        taken = ahead.take()
        assert (taken.to(gpu.torch_device).images == value).all()
    with pytest.raises(StopIteration):
        ahead.take()
    ahead.close()
    assert gpu.cuda.selected == [3, 3], "the thread has chosen the device of its maker"


def test_a_save_in_background_is_copied_into_page_locked_memory(gpu: FakeGpu, tmp_path: Path) -> None:
    staging = Staging(gpu)
    copies = [staging.copy(torch.arange(6.0)), staging.copy(torch.ones(2))]
    staging.wait()
    assert (gpu.cuda.said["pin"], gpu.cuda.said["synchronize"]) == (2, 1)
    staging.begin()
    assert staging.copy(torch.zeros(6)) is copies[0], "the memory is kept"
    staging.copy(torch.zeros(2))
    assert gpu.cuda.said["pin"] == 2
    staging.begin()
    held = [Range("w", 0, 6, {WEIGHT: torch.arange(6.0)})]
    writer = StateWriter(World(0, 1, 0, 1), held, {"w": (6,)}, {}, staging)
    assert gpu.cuda.said["synchronize"] == 2, "it is made once all is copied"
    files: dict[str, Stored] = {}
    writer.write(tmp_path, files)
    assert list(files) == ["state/00000.safetensors"]


def result(value: float) -> StepSums:
    sums = StepSums.empty(["loss"], 1, torch.device("cpu"))
    sums.add({"loss": torch.full((4,), value)}, torch.zeros(4, dtype=torch.int64))
    return sums


def test_metrics_are_read_a_step_late_and_nobody_waits(gpu: FakeGpu) -> None:
    reducer, times = Reducer(gpu, 0, 1), StepTimes(2.0, 0.25, 1.0, 0.125)
    reducer.put(1, result(3.0), grad_norm=1.0, rates={"lr": 0.1}, times=times)
    assert gpu.cuda.said["pin"] == 2, "one up, one down"
    assert gpu.cuda.said["Event.synchronize"] == 0
    reduced = reducer.take()
    assert reduced is not None
    assert gpu.cuda.said["Event.synchronize"] == 1
    assert gpu.cuda.said["synchronize"] == 0, "of what was handed out since, nothing is waited for"
    assert (reduced.losses, reduced.data_wait, reduced.comm_wait) == ({"loss": 3.0}, 0.25, 0.125)
    assert (reduced.peak_gb, reduced.reserved_gb, gpu.cuda.said["reset_peak_memory_stats"]) == (3.0, 4.0, 1)
    line = reduced.line(["a"], rate=2.0, seconds=2.0, mfu=0.4, bad_steps=0)
    assert {k: line[k] for k in ("mfu", "peak_gb", "reserved_gb")} == {"mfu": 0.4, "peak_gb": 3.0, "reserved_gb": 4.0}
    assert "comm_wait" not in line, "one process waits for none"
    on_cpu = Reducer(CPU, 0, 1)
    on_cpu.put(1, result(3.0), grad_norm=1.0, rates={"lr": 0.1}, times=times)
    reduced = on_cpu.take()
    assert reduced is not None
    assert "peak_gb" not in reduced.line(["a"], rate=2.0, seconds=2.0, mfu=None, bad_steps=0)


@pytest.mark.parametrize("make", [lambda: CPU, FakeGpu])
def test_the_times_of_a_step(make: Callable[[], Device]) -> None:
    """Two micro-batches; the host sleeps in place of what a rank does in each phase."""
    on = make()
    watch = Stopwatch(on)
    phases = [
        (Phase.WAITING, 0.02), (Phase.COMPUTING, 0.04), (Phase.DIFFERENTIATING, 0.01), (Phase.COMPUTING, 0.01),
        (Phase.DIFFERENTIATING, 0.01), (Phase.REDUCING, 0.08), (Phase.UPDATING, 0.03),
    ]  # fmt: skip
    for _ in range(2):
        for phase, seconds in phases:
            watch.enter(phase)
            sleep(seconds)
        times = watch.step_done()
        data, comm = times.data_wait * times.seconds, times.comm_wait * times.seconds
        for found, least in ((data, 0.02), (times.compute_seconds, 0.06), (comm, 0.08)):
            assert least - 1e-3 < found < times.seconds - (0.2 - least) + 1e-3, "what the rest took is not in it"
    if isinstance(on, FakeGpu):
        assert on.cuda.said["synchronize"] == 0
        assert on.cuda.said["Event.synchronize"] == 4
    watch.reset()
    watch.enter(Phase.COMPUTING)
    assert watch.step_done().comm_wait == 0.0, "a step without a reduction"


def test_the_guard_watches_later_steps_but_for_the_wait_that_is_meant(gpu: FakeGpu) -> None:
    guard = SyncGuardHook("error", gpu)
    guard.on_start(RunState())
    for step in range(2):
        guard.before_step(RunState(step), batch(1))
        with gpu.meant_wait():  # the norm's, which "error" would refuse
            pass
        guard.after_step(RunState(step + 1), cast(StepResult, None))
    assert gpu.cuda.modes == ["default", "default", "error", "default", 2, "default"], "a save between steps may wait"
    guard.on_start(RunState())
    guard.before_step(RunState(), batch(1))
    assert gpu.cuda.modes[6:] == ["default"], "what is compiled in a start's first step waits"


def test_a_trace_that_a_rollback_ends_records_no_longer(gpu: FakeGpu, tmp_path: Path) -> None:
    hook = ProfileHook(ProfileSettings(start=2, steps=3, memory=True), tmp_path, cast(RunLogger, None), gpu)
    hook.on_start(RunState())
    hook.before_step(RunState(2), batch(1))
    hook.on_start(RunState(3))
    hook.after_step(RunState(9), cast(StepResult, None))
    assert (gpu.cuda.said["memory on"], gpu.cuda.said["memory off"]) == (1, 1)


ALONE = """
import sys
import deepspeed
import torch
from accelerate.state import DistributedType, PartialState
from fake_gpu import FakeGpu
from stamo_dist import device
from stamo_dist.distributed.rank import world_from_environment
from stamo_dist.distributed.strategies import EngineSpec
from stamo_dist.optim.optimizer import adamw
from stamo_dist.recipe.batching import Batching
from stamo_dist.recipe.training import Optimizer, Strategy

device._current = FakeGpu(count=1)
PartialState._prepare_backend = lambda self, cpu, *_: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
DDP = torch.nn.parallel.DistributedDataParallel

def ddp(module, device_ids, output_device, **options):
    print("device", device_ids, output_device)
    return DDP(module, **options)

torch.nn.parallel.DistributedDataParallel = ddp
cpu = deepspeed.accelerator.get_accelerator()
cpu.set_device = lambda number: print("device", [number], number)
world = world_from_environment()
module, spread = torch.nn.Linear(2, 2), Batching(world_size=2, per_rank=1, micro_batch=1, accumulation=1)
spec = EngineSpec(Strategy(name=sys.argv[1]), world, spread, None, "fp32", ())
spec.build(module, adamw(module, Optimizer()))
assert world_from_environment() == world
"""


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_process_that_sees_one_gpu_of_its_node_takes_it(strategy: str) -> None:
    """As under Slurm with one GPU a task: Accelerate and DeepSpeed would name the fourth of one."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port())}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE, strategy], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **env, "RANK": str(rank), "LOCAL_RANK": str(2 + rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        said = rank.communicate(timeout=240)[0]
        assert {line for line in said.splitlines() if line.startswith("device ")} == {"device [0] 0"}, said
        assert rank.returncode == 0, said


PROBED = """
import sys
from pathlib import Path
from fake_gpu import FakeGpu
from stamo_dist import device
from stamo_dist.launch.doctor import probe

device._current = FakeGpu()
device._current.backend, probe._LARGE = "gloo", 1 << 12
sys.exit(probe.main(Path(sys.argv[1]), [], ""))
"""


def test_the_doctor_looks_at_gpus(tmp_path: Path) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(reserve_port()), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", PROBED, str(tmp_path)], env={**os.environ, **env}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    report = json.loads((tmp_path / "rank_00000.json").read_text())
    assert (done.returncode, report["stage"], report["error"]) == (0, "done", ""), done.stderr
    assert report["gpus"] == ["NVIDIA H100 80GB HBM3"] * 8
    assert report["init"].keys() == report["latency"].keys() == {"gloo", "nccl"}
