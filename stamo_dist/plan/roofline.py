"""How long a step should take on a GPU: predicted from its operators, at stated shares of what the hardware can do.

No GPU has measured these figures. Each operator takes the longer of its arithmetic and its memory traffic; collectives
count where nothing hides them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stamo_dist.distributed.engine import ZERO_STAGE
from stamo_dist.models.flops import shapes_only
from stamo_dist.plan.memory import Counted
from stamo_dist.plan.operators import REST, Operator, fused, traced
from stamo_dist.plan.shapes import Shapes, shapes
from stamo_dist.recipe.batching import Batching, batchings
from stamo_dist.recipe.schema import Recipe

#: Of the peak, what a kernel reaches: assumptions.
EFFICIENCY = {"gemm": 0.70, "convolution": 0.55, "attention": 0.40}
ATTENTION_BACKWARD = 0.30
BANDWIDTH = 0.85  # of the memory's
LINK = 0.80  # of NVLink's and the network's
KERNEL = 3e-6  # seconds that the smallest kernel takes
WAITS = 5e-3  # seconds of a step in which the host waits for the norm, and the device for the host
NETWORK = 50e9  # bytes/s of a GPU to other nodes: a NIC of 400 Gb/s each, and a group of several nodes uses all of them
NODE = 8  # GPUs
CLASSES = {"gemm": "GEMM", "convolution": "convolution", "attention": "attention", "memory": "memory-bound"}


@dataclass(frozen=True)
class GPU:
    name: str
    flops: float  # dense bf16, a second
    memory: float  # bytes/s
    link: float  # NVLink, bytes/s in one direction


GPUS = (
    GPU("A100", 312e12, 2.04e12, 300e9),
    GPU("H100", 989e12, 3.35e12, 450e9),
    GPU("H200", 989e12, 4.8e12, 450e9),
    GPU("B200", 2250e12, 8.0e12, 900e9),
)


@dataclass
class Expected:
    """A prediction of one optimizer step."""

    gpu: str
    samples: int  # of a step, on all devices
    useful_flops: float  # of one device's step, without what is recomputed
    peak_flops: float
    by_part: dict[str, float] = field(default_factory=dict)  # seconds
    by_class: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.by_part.values())

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds

    @property
    def mfu(self) -> float:
        return self.useful_flops / self.seconds / self.peak_flops

    def add(self, part: str, kind: str, seconds: float) -> None:
        for found, name in ((self.by_part, part), (self.by_class, kind)):
            found[name] = found.get(name, 0.0) + seconds

    def to_dict(self) -> dict[str, Any]:
        numbers = {
            "global_batch": self.samples,
            "seconds": self.seconds,
            "samples_per_second": self.samples_per_second,
            "mfu": self.mfu,
        }
        return {"gpu": self.gpu, **numbers, "by_part": self.by_part, "by_class": self.by_class}

    @property
    def line(self) -> str:
        return (
            f"{self.gpu}: {self.seconds:.3g} s a step, {self.samples_per_second:,.0f} samples/s, "
            f"MFU {self.mfu:.0%} (prediction)"
        )


def expect(recipe: Recipe, devices: int, gpus: Iterable[GPU] = GPUS) -> list[Expected]:
    """What a step of the recipe should take on each GPU, with each global batch; nothing where it is not in bf16.

    Raises:
        RecipeError: The size of a checkpoint is not known.
        ValueError: The global batch cannot be spread over so many devices.
    """
    if recipe.train.precision != "bf16":
        return []
    traces: dict[int, tuple[Counted, list[Operator]]] = {}  # by the micro-batch
    found = []
    for spread in batchings(recipe.train, devices):
        if spread.micro_batch not in traces:
            made = shapes(recipe)  # anew for each: a trace changes the modules
            traces[spread.micro_batch] = Counted(made, bf16=True), _operators(made, spread.micro_batch)
        found += _expect(recipe, *traces[spread.micro_batch], spread, gpus)
    return found


def _expect(
    recipe: Recipe, counted: Counted, operators: list[Operator], spread: Batching, gpus: Iterable[GPU]
) -> list[Expected]:
    useful = spread.accumulation * sum(op.flops for op in operators if not op.again)
    if recipe.train.compile:
        operators = fused(operators)
    found = []
    for gpu in gpus:
        expected = Expected(gpu.name, spread.global_batch, useful, gpu.flops)
        for op in operators:
            seconds = spread.accumulation * _seconds(op, gpu)
            expected.add(op.part, "recomputed" if op.again else CLASSES[op.kind], seconds)
        _add_updates(expected, recipe, counted, gpu, spread)
        _add_collectives(expected, recipe, counted, gpu, spread)
        expected.add("waits", "waits", WAITS)
        found.append(expected)
    return found


def _operators(made: Shapes, batch: int) -> list[Operator]:
    modules = [made.trained, *made.frozen]
    for module in modules:
        module.bfloat16()
    with shapes_only(*modules):
        return traced(lambda: made.step(batch), made.parts)


def _seconds(op: Operator, gpu: GPU) -> float:
    share = ATTENTION_BACKWARD if op.kind == "attention" and op.backward else EFFICIENCY.get(op.kind, 1.0)
    return max(op.flops / (gpu.flops * share), op.bytes / (gpu.memory * BANDWIDTH), KERNEL)


def _shards(recipe: Recipe, devices: int) -> int:
    """Processes that share the optimizer's states."""
    if recipe.strategy.name == "ddp":
        return 1
    return (recipe.strategy.shard_group or min(devices, NODE)) if recipe.strategy.name == "hsdp" else devices


def _add_updates(expected: Expected, recipe: Recipe, counted: Counted, gpu: GPU, spread: Batching) -> None:
    """Norm, clipping, AdamW and the average: what they read and write, in bytes a parameter."""
    shards, devices, rate = _shards(recipe, spread.world_size), spread.world_size, gpu.memory * BANDWIDTH
    copies = 2 if recipe.strategy.name in ZERO_STAGE else 0  # in bf16, from the fp32 masters
    clip = 4 + 8  # read; read and written
    expected.add("optimizer", "optimizer", (28 + copies + clip) * counted.trained / shards / rate)
    if recipe.train.ema is not None:
        share = shards if recipe.strategy.name == "hsdp" else devices
        expected.add("EMA", "optimizer", 20 * counted.trained / share / rate)  # through a copy of the weights
    if recipe.strategy.name == "ddp":  # autocast makes bf16 weights of the fp32 ones for each micro-batch
        expected.add(REST, CLASSES["memory"], spread.accumulation * 6 * counted.matrices / rate)


def _add_collectives(expected: Expected, recipe: Recipe, counted: Counted, gpu: GPU, spread: Batching) -> None:
    """What the collectives take beyond the computation that hides them."""
    if spread.world_size == 1:
        return
    shards = _shards(recipe, spread.world_size)
    group = spread.world_size if shards == 1 else shards
    rate = LINK * (gpu.link if group <= NODE else min(gpu.link, NODE * NETWORK)) * group / (group - 1)
    gathers, reduces, late = volumes(recipe, counted, spread)
    hidden = (gathers + reduces) / rate
    copies = spread.world_size // shards
    if recipe.strategy.name == "hsdp" and copies > 1:
        hidden += 8 * counted.trained / shards / (LINK * NETWORK)
    computing = sum(s for kind, s in expected.by_class.items() if kind != "optimizer")
    expected.add("communication", "collective", max(0.0, hidden - computing) + late / rate)


def volumes(recipe: Recipe, counted: Counted, spread: Batching) -> tuple[float, float, float]:
    """Bytes that a device gathers and reduces in a step while it computes, and those after the update."""
    name, micros = recipe.strategy.name, spread.accumulation
    weights, gradients = 2.0 * counted.all, 4.0 * counted.trained
    if name == "ddp":
        return 0.0, 2 * gradients, 0.0
    if name in ("zero1", "zero2"):
        return 0.0, gradients * (1 if name == "zero1" else micros), 2.0 * counted.trained
    again = name == "zero3" or recipe.strategy.reshard_after_forward
    whole = name != "zero3" and recipe.strategy.gradients == "whole"
    return micros * weights * (2 if again else 1), gradients * (1 if whole else micros), 0.0
