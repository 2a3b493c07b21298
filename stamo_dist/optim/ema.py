"""Exponential moving average of the trained weights, distributed over the processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stamo_dist.distributed.dcp import Piece, offset_of, read_dcp, read_ranges


class EMA:
    """fp32 average of every trainable parameter: ē ← d·ē + (1−d)·θ.

    d at step t is min(decay, (1+t)/(10+t)): early averages forget the initial weights.

    A process keeps the average of its shards of θ; if every process has all of θ (ddp, zero1, zero2), an equal
    share of all concatenated parameters.
    """

    def __init__(self, module: nn.Module, decay: float):
        self._decay = decay
        self._params: dict[str, Any] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._ranges = dict(self._own())
        self._average = self._weights()

    def _own(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The ranges that this process keeps: name, first element of the flattened parameter, number of elements."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        share = -(-sum(p.numel() for p in self._params.values()) // world)
        passed = 0
        for name, p in self._params.items():
            if hasattr(p, "ds_tensor"):  # zero3's equal shares, of which the last may be padded
                start = rank * p.ds_tensor.numel()
                stop = min(start + p.ds_tensor.numel(), p.ds_numel)
            elif hasattr(p, "to_local"):
                start = offset_of(p)
                stop = start + p.to_local().numel()
            else:
                start = max(rank * share - passed, 0)
                stop = min((rank + 1) * share - passed, p.numel())
                passed += p.numel()
            if stop > start:
                yield name, (start, stop - start)

    def _weights(self) -> dict[str, Tensor]:
        """Flat fp32 copies of the ranges that this process keeps."""
        found = {}
        for name, (start, numel) in self._ranges.items():
            p = self._params[name]
            if hasattr(p, "ds_tensor"):
                local = p.ds_tensor.detach()[:numel]
            elif hasattr(p, "to_local"):
                local = p.detach().to_local().reshape(-1)
            else:
                local = p.detach().reshape(-1)[start : start + numel]
            found[name] = local.to(torch.float32, copy=True)
        return found

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update with the weights after the 1-based optimizer `step`."""
        if not self._average:  # more processes than parameters have elements
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), list(self._weights().values()), 1 - decay)

    def pieces(self) -> dict[str, Piece]:
        """This process's part of the average by parameter name, for a `DcpWriter`; tensors are the live ones."""
        wholes = {n: int(getattr(p, "ds_numel", p.numel())) for n, p in self._params.items()}
        return {n: Piece(t, self._ranges[n][0], wholes[n]) for n, t in self._average.items()}

    def load(self, folder: Path) -> None:
        """Read an average written on any number of processes; starts from the weights if there is none."""
        if not folder.is_dir():
            self._average = self._weights()
            return
        for name, stored in read_ranges(folder, {f"ema.{n}": r for n, r in self._ranges.items()}).items():
            self._average[name.removeprefix("ema.")].copy_(stored)

    @staticmethod
    def read(folder: Path) -> dict[str, Tensor]:
        """The whole average on the CPU, without a process group; flat, except if written by earlier versions."""
        return read_dcp(folder, "ema")
