"""Exponential moving average of the trained weights, kept in the shards each process already holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from stamo_dist.distributed.dcp import read_dcp


class EMA:
    """fp32 average of every trainable parameter: ē ← d·ē + (1−d)·θ, on this process's shard of θ.

    d at step t is min(decay, (1+t)/(10+t)): early averages forget the initial weights.

    Under zero3 a shard is a flat, padded slice; elsewhere it is the parameter or its DTensor shard.
    """

    def __init__(self, module: nn.Module, decay: float):
        self._decay = decay
        self._params: dict[str, Any] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._zero3 = any(hasattr(p, "ds_tensor") for p in self._params.values())
        self._average = {n: t.clone().float() for n, t in self._local().items()}

    def _local(self) -> dict[str, Tensor]:
        return {n: (p.ds_tensor if self._zero3 else p).detach() for n, p in self._params.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after the 1-based optimizer `step`."""
        decay = min(self._decay, (1 + step) / (10 + step))
        local = [_plain(t).float() for t in self._local().values()]
        torch._foreach_lerp_([_plain(t) for t in self._average.values()], local, 1 - decay)

    def whole(self) -> dict[str, Tensor]:
        """The average by parameter name, as PyTorch's distributed checkpoint takes it; every process calls it.

        Tensors are the live ones; under zero3 rank 0 has whole copies and the others nothing.
        """
        if not self._zero3:
            return self._average
        whole = {}
        for name, p in self._params.items():
            shard = self._average[name]
            full = shard.new_empty(dist.get_world_size() * shard.numel())
            dist.all_gather_into_tensor(full, shard.contiguous())
            if dist.get_rank() == 0:
                whole[name] = full[: p.ds_numel].view(p.ds_shape).cpu()
        return whole

    def load(self, folder: Path) -> None:
        """Read an average written on any number of processes; starts from the weights where there is none."""
        if not folder.is_dir():
            self._average = {n: t.clone().float() for n, t in self._local().items()}
        elif not self._zero3:
            dcp.load({"ema": self._average}, checkpoint_id=folder)
        else:
            for name, full in self.read(folder).items():
                shard = self._average[name]
                mine = full.flatten()[dist.get_rank() * shard.numel() :][: shard.numel()]
                shard[: mine.numel()].copy_(mine)

    @staticmethod
    def read(folder: Path) -> dict[str, Tensor]:
        """The whole average on the CPU, without a process group."""
        return read_dcp(folder, "ema")


def _plain(t: Tensor) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t
