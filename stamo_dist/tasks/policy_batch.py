"""Preparing the inputs of a policy network from a batch, on the batch's device.

The tables are small and are moved there once, so that no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stamo_dist.models.openvla.actions import ActionTokenizer, ValueRange
from stamo_dist.models.openvla.network import IGNORE
from stamo_dist.models.openvla.text import TextTokenizer

_EPSILON = 1e-8  # of the official normalisation


class Ranges:
    """Normalisation by source, in float64: the same numbers as `ValueRange` gives, for mixed batches."""

    def __init__(self, ranges: Sequence[ValueRange | None], dim: int, *, constant_is_zero: bool):
        """`constant_is_zero`: dimensions that never change become 0, as in actions; they do not in proprioception."""
        zero, one = torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
        rows = [
            (zero, one, zero.bool(), one.bool())
            if r is None
            else tuple(map(torch.from_numpy, (r.low, r.high, r.mask, r.constant & constant_is_zero)))
            for r in ranges
        ]
        self._tables = [torch.stack(column) for column in zip(*rows, strict=True)]
        self._there = torch.tensor([r is not None for r in ranges])

    def to(self, device: torch.device) -> None:
        self._tables, self._there = [table.to(device) for table in self._tables], self._there.to(device)

    def have(self, source: Tensor) -> Tensor:
        """(B,) bool: which samples' sources have a range."""
        return self._there[source]

    def normalise(self, values: Tensor, source: Tensor) -> Tensor:
        """(B, …, A) in the sources' units and (B,) int64 → float64 of the same shape, 0 without a range."""
        middle = (1,) * (values.ndim - 2)
        low, high, mask, constant = (t[source].unflatten(0, (-1, *middle)) for t in self._tables)
        values = values.double()
        scaled = (2 * (values - low) / (high - low + _EPSILON) - 1).clamp(-1, 1)
        return torch.where(constant, 0.0, torch.where(mask, scaled, values))


class Tokens(NamedTuple):
    """The text of a batch, each row padded on the right to the same length in every batch."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) bool
    labels: Tensor  # (B, L) int64
    prompts: Tensor  # (B,) int64


class Prompts:
    """The encoded prompts of all instructions, and batches made of them, equal to `TextTokenizer.encode`."""

    def __init__(self, text: TextTokenizer, texts: Sequence[str], coder: ActionTokenizer, places: int, blanks: bool):
        """`places`: action ids after a prompt; `blanks`: placeholders for samples without actions (parallel policy)."""
        ids = [text.prompt_ids(t) for t in texts]
        self._places, self._blanks, self._vocabulary = places, blanks, coder.vocabulary
        self._edges = torch.from_numpy(coder.edges)
        self._lengths = torch.tensor([len(row) for row in ids])
        self._table = torch.full((len(ids), int(self._lengths.max()) + places + 1), text.pad)
        for row, prompt in zip(self._table, ids, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self._bos, self._eos = text.bos, text.eos

    @property
    def length(self) -> int:
        """L of every batch."""
        return self._table.shape[1]

    @property
    def table(self) -> Tensor:
        """(texts, L) ids of the prompts alone."""
        return self._table

    def to(self, device: torch.device) -> None:
        self._table, self._lengths = self._table.to(device), self._lengths.to(device)
        self._edges = self._edges.to(device)

    def rows(self, numbers: Tensor, actions: Tensor, has: Tensor) -> Tokens:
        """Text indices (B,), normalised actions float64 (B, C, A) and their mask (B,) bool → the batch's text."""
        low, high = self._edges[0], self._edges[-1]
        ids = self._vocabulary - torch.bucketize(actions.clamp(low, high).flatten(1), self._edges, right=True)
        ids = torch.where(has[:, None], ids, self._bos)
        tail = torch.cat([ids, ids.new_full((len(ids), 1), self._eos)], dim=1)
        prompts = self._lengths[numbers]
        place = torch.arange(self.length, device=numbers.device) - prompts[:, None]
        behind = (place >= 0) & (place <= self._places) & (has | self._blanks)[:, None]
        input_ids = torch.where(behind, tail.gather(1, place.clamp(0, self._places)), self._table[numbers])
        labels = torch.where(behind & has[:, None], input_ids, IGNORE)
        return Tokens(input_ids, behind | (place < 0), labels, prompts)
