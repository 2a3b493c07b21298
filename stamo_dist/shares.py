"""What a process holds of a tensor that zero3 has cut up, and of what every process holds."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def everyone() -> tuple[int, int]:
    """The replica that this process is of what all processes hold."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The whole's shape of a tensor that may be a shard."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def share_of(parameter: Any, rank: int) -> tuple[int, int]:
    """zero3's equal share of a parameter, the last ones cut short: first element and how many."""
    share = parameter.ds_tensor.numel()
    start = min(rank * share, parameter.ds_numel)
    return start, min(share, parameter.ds_numel - start)
