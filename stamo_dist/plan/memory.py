"""Memory of one device by purpose, under every strategy."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from stamo_dist.distributed import strategies
from stamo_dist.distributed.engine import ZERO_STAGE
from stamo_dist.models.flops import shapes_only
from stamo_dist.plan.activation_peak import peak
from stamo_dist.plan.shapes import Shapes, shapes
from stamo_dist.recipe.batching import batchings
from stamo_dist.recipe.schema import Recipe

_ZERO1_BUCKET = 500_000_000  # numbers that DeepSpeed reduces at once without sharding gradients
_ZERO3_LIVE = 1_000_000_000  # gathered numbers that DeepSpeed lets live
_ZERO3_PREFETCH = 50_000_000  # numbers that it gathers at once


@dataclass
class Memory:
    """Memory of one device in bytes; `peak` is the maximum during a step."""

    strategy: str
    devices: int
    micro_batch: int
    parameters: int  # the trained module's share, its frozen parameters included
    gradients: int
    optimizer: int  # moments, fp32 master copies where parameters are bf16, and the moving average
    frozen: int  # encoder and VAE beside it, and buffers
    gathered: int  # gathered parameters while a block is computed, and communication buffers
    activations: int
    apart: int = 0  # of gradients and activations: what is never there at once, as the last come when the first go
    trained_numel: int = 0
    frozen_numel: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        lasting = self.parameters + self.optimizer + self.frozen
        return lasting + self.gathered + self.gradients + self.activations - self.apart


def plan(recipe: Recipe, devices: int, strategies: list[str] | None = None) -> list[Memory]:
    """The memory of one of `devices` devices under the recipe's strategy, or under each of `strategies`.

    Where the global batch changes, what all of its sizes need.

    Raises:
        RecipeError: The size of a checkpoint is not known.
        ValueError: The global batch, or hsdp's group, cannot be spread over so many devices.
    """
    recipe.strategy.check_processes(devices)
    spreads = batchings(recipe.train, devices)
    micro_batch, parts = max(s.micro_batch for s in spreads), max(s.accumulation for s in spreads)
    made = shapes(recipe)
    counted = Counted(made, bf16=recipe.train.precision == "bf16")
    activations = _activations(made, micro_batch, bf16=counted.bf16)
    group = recipe.strategy.shard_group or min(devices, 8)
    found = []
    for name in strategies or [recipe.strategy.name]:
        memory = counted.spread(name, devices, group if name == "hsdp" else devices, ema=recipe.train.ema is not None)
        if name in ("fsdp", "hsdp"):
            if recipe.strategy.gradients == "whole" and parts > 1:
                memory.gradients = 4 * counted.trained  # in the last backward pass they go as the shares come
            if not recipe.strategy.reshard_after_forward and devices > 1:
                # The peak is where the backward pass begins: with each block's gradient, its weights are let go of.
                shards = group if name == "hsdp" else devices
                memory.gathered = int(counted.size * (counted.all + counted.unit) + 4 * counted.unit / shards)
                memory.apart = memory.gradients if parts == 1 else 0
        memory.micro_batch, memory.activations = micro_batch, activations
        if name == "ddp" and counted.bf16:
            memory.activations += 2 * counted.matrices  # autocast keeps bf16 copies until the backward pass is done
        if parts == 1 and name not in ZERO_STAGE and not memory.apart:
            memory.apart = min(memory.gradients, memory.activations)
        memory.notes = made.notes
        found.append(memory)
    return found


class Counted:
    """How many numbers of each kind the modules have."""

    def __init__(self, made: Shapes, *, bf16: bool):
        self.bf16 = bf16
        parameters = list(made.trained.parameters())
        self.all = sum(p.numel() for p in parameters)
        self.trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.stored = sum(p.numel() * p.element_size() for p in parameters)  # bytes; a frozen base may be bf16
        self.matrices = sum(p.numel() for p in parameters if p.ndim > 1 and p.dtype == torch.float32)
        self.beside = sum(p.numel() for module in made.frozen for p in module.parameters())
        buffers = [b for module in (made.trained, *made.frozen) for b in module.buffers()]
        self.buffers = sum(b.numel() * b.element_size() for b in buffers)
        units = [_numel(m) for m in made.trained.modules() if type(m).__name__ in made.blocks]
        self.unit = max(units, default=0)
        self.root = self.all - sum(units)
        self.size = 2 if bf16 else 4  # bytes of a number in computation

    def spread(self, name: str, devices: int, shards: int, *, ema: bool) -> Memory:
        size = self.size
        share = 1 / shards
        average = 4 * self.trained / devices if ema else 0.0
        gathered = 0.0
        if name == "ddp":
            parameters, gradients, optimizer = float(self.stored), 4.0 * self.trained, 8.0 * self.trained + average
            gathered = 4.0 * self.trained if devices > 1 else 0.0  # its buckets hold a second copy of every gradient
        elif name in ZERO_STAGE:
            stage = ZERO_STAGE[name]
            parameters = size * self.all * (share if stage == 3 else 1)
            master = 4 * self.trained * share
            optimizer = master + 8 * self.trained * share + average
            gradients = 4 * self.trained * (1 if stage == 1 else share)
            gathered = 2.0 * size * min(self.trained, strategies.REDUCE_BUCKET)
            if stage == 1:  # its gradients in bf16 beside those in fp32, and what it reduces of these in a copy
                gradients += size * self.trained
                gathered = 4.0 * min(self.trained, _ZERO1_BUCKET)
            if stage == 3:
                gathered += size * min(self.all, max(_ZERO3_LIVE, 2 * (self.unit + self.root)))
                gathered += size * min(self.all, _ZERO3_PREFETCH)  # they come in one piece, and are copied out of it
        else:
            parameters, gradients = self.stored * share, 4 * self.trained * share
            optimizer = 8 * self.trained * share + average
            if shards > 1:
                # The root stays gathered from forward to backward; one block is computed, another prefetched. Then
                # comes a block's gradient, and again in fp32, in which it is reduced.
                gathered = size * (self.root + 2 * self.unit) + (size + 4) * max(self.unit, self.root)
        return Memory(
            name,
            devices,
            micro_batch=0,
            parameters=int(parameters),
            gradients=int(gradients),
            optimizer=int(optimizer),
            frozen=(2 if self.bf16 else 4) * self.beside + self.buffers,
            gathered=int(gathered),
            activations=0,
            trained_numel=self.trained,
            frozen_numel=self.all - self.trained + self.beside,
        )


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _activations(made: Shapes, batch: int, *, bf16: bool) -> int:
    modules = [made.trained, *made.frozen]
    if bf16:
        for module in modules:
            module.bfloat16()
    with shapes_only(*modules):
        return peak(lambda: made.step(batch), modules)
