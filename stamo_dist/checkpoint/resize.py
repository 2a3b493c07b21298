"""Weights of another shape: position tables of another image size, and what depends on the number of state tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]
_NOISE = 0.1  # of a new query, relative to the one that it is a copy of


def of_name(name: str) -> str | None:
    """Which entry of `init_from.resize` lets a tensor have another shape; None where it has no meaning."""
    return next((entry for entry, rules in _RULES.items() for rule in rules if re.fullmatch(rule, name)), None)


def resized(name: str, stored: Tensor, shape: Shape) -> Tensor | None:
    """A stored tensor in another shape, the same on every process; None where the model computes its own.

    Raises:
        ValueError: More differs than the size of images or the number of tokens.
    """
    change = next(c for rules in _RULES.values() for rule, c in rules.items() if re.fullmatch(rule, name))
    return change(stored, shape)


def fits(name: str, stored: Shape, shape: Shape) -> bool:
    """Whether `resized` can make the one shape of the other."""
    try:
        resized(name, torch.zeros(stored), shape)
    except ValueError:
        return False
    return True


def _interpolated(table: Tensor, shape: Shape) -> Tensor:
    """(1, 1 + n², D), the class token first, as DINOv2 resamples its own."""
    before, after = math.isqrt(table.shape[1] - 1), math.isqrt(shape[1] - 1)
    if table.shape[2] != shape[2] or before**2 != table.shape[1] - 1 or after**2 != shape[1] - 1:
        raise ValueError("another width, or no square")
    grid = table[:, 1:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _repeated(rows: Tensor, shape: Shape) -> Tensor:
    """The first rows; more are copies of the first ones."""
    if rows.shape[1:] != shape[1:]:
        raise ValueError("another width")
    return rows[torch.arange(shape[0]) % len(rows)]


def _queries(rows: Tensor, shape: Shape) -> Tensor:
    """As `_repeated`; copies are told apart by a little noise."""
    found, old = _repeated(rows, shape), len(rows)
    if shape[0] > old:
        noise = torch.randn(shape[0] - old, *shape[1:], generator=torch.Generator().manual_seed(0))
        found[old:] += _NOISE * rows.float().std() * noise.to(found.dtype)
    return found


def _columns(matrix: Tensor, shape: Shape) -> Tensor:
    """Of a map from the flattened state: new tokens have no effect yet."""
    if len(matrix) != shape[0]:
        raise ValueError("another width")
    kept = min(matrix.shape[1], shape[1])
    return F.pad(matrix[:, :kept], (0, shape[1] - kept))


_RULES: Mapping[str, Mapping[str, Callable[[Tensor, Shape], Tensor | None]]] = {
    "positions": {
        r"encoder\.model\.embeddings\.position_embeddings": _interpolated,
        r"decoder\.transformer\.pos_embed\.pos_embed": lambda table, shape: None,  # computed for every size
    },
    "tokens": {
        r"compressor\.queries": _queries,
        r"compressor\.state_(mean|std|map)": _repeated,
        r"decoder\.transformer\.time_text_embed\.text_embedder\.linear_1\.weight": _columns,
        r"straight\.weight": _columns,
    },
}
