"""Metrics of a run: reduced over ranks in one collective a step, written to metrics.jsonl first, then W&B.

Values are read on the host one step after they were computed, so logging never makes the device wait.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stamo_dist.distributed.engine import Phase
from stamo_dist.distributed.rank import few_of

_OF_RANK = 5  # number of per-rank values in the reduction


@dataclass
class StepSums:
    """Sums over the samples of one optimizer step on this rank: loss terms and counts, per source."""

    terms: tuple[str, ...]
    #: float64, in which sums of this few float32 are exact, so the order of samples and ranks does not matter.
    #: (2 · terms + 2, sources): the sums, the samples of each, all samples, replaced unreadable ones
    values: Tensor
    lacking: set[str] = field(default_factory=set)  # terms that some samples may lack

    @classmethod
    def empty(cls, terms: Sequence[str], sources: int, device: torch.device) -> StepSums:
        return cls(tuple(terms), torch.zeros(2 * len(terms) + 2, sources, device=device, dtype=torch.float64))

    def add(
        self,
        per_sample: dict[str, Tensor],
        source: Tensor,
        replaced: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`per_sample`: term → (B,); `source`: (B,) int64; `replaced`: (B,) bool; `present`: term → (B,) bool."""
        ones, present = torch.ones_like(source), present or {}
        self.lacking |= set(present)
        there = [present.get(t, ones) for t in self.terms]
        rows = [*(per_sample[t].detach() for t in self.terms), *there, ones]
        rows.append(torch.zeros_like(source) if replaced is None else replaced)
        self.values.index_add_(1, source, torch.stack([row.double() for row in rows]))


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step on one rank."""

    seconds: float
    data_wait: float  # share of the seconds spent waiting for data
    compute_seconds: float  # until the rank first waited for the others


@dataclass(frozen=True)
class Reduced:
    """The metrics of one step, reduced over all ranks."""

    step: int
    losses: dict[str, float]  # mean of each term over the samples that have it; without terms that no sample has
    per_source: dict[str, list[float | None]]  # the same by source
    #: The terms that samples may lack → share of the samples that have it, and the same by source.
    shares: dict[str, tuple[float, list[float | None]]]
    counts: list[int]  # samples, per source
    grad_norm: float
    lr: float
    seconds: float
    data_wait: float  # share of the seconds spent waiting for data
    skipped: list[int]  # samples whose frames could not be read, per source
    compute_seconds: list[float]  # each rank's StepTimes.compute_seconds
    peak_gb: float  # maximum memory of a step on any rank's device, allocated and reserved; 0 on a CPU
    reserved_gb: float
    signals: dict[int, str]  # rank → signal that requests it to stop
    not_finite: list[int]  # ranks whose loss was not finite

    @property
    def blame(self) -> str:
        """A description of what was not finite in the step, and on which ranks."""
        if self.not_finite:
            return f"the loss on rank {few_of(self.not_finite)} is not finite"
        return "the gradient is not finite"

    @property
    def spread(self) -> dict[str, float]:
        """Seconds of the step on the slowest rank, and on the fastest without waiting for the others."""
        slowest = max(range(len(self.compute_seconds)), key=self.compute_seconds.__getitem__)
        spread = max(self.compute_seconds) - min(self.compute_seconds)
        return {
            "step_seconds_max": round(self.seconds, 4),
            "step_seconds_min": round(max(0.0, self.seconds - spread), 4),
            "slowest_rank": slowest,
        }

    def line(
        self, sources: Sequence[str], *, rate: float, seconds: float, mfu: float | None, bad_steps: int
    ) -> dict[str, Any]:
        """The step's line in metrics.jsonl; `rate` in samples per second, `seconds` of training so far."""
        terms = [*self.per_source.items(), *((f"share/{t}", shares) for t, (_, shares) in self.shares.items())]
        each = ((t, s, mean) for t, means in terms for s, mean in zip(sources, means, strict=True))
        return {
            "step": self.step,
            **self.losses,
            **{f"share/{term}": share for term, (share, _) in self.shares.items()},
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "samples_per_second": round(rate, 3),
            "data_wait": round(self.data_wait, 4),
            "seconds": round(seconds, 3),
            **({"mfu": round(mfu, 4)} if mfu is not None else {}),
            **({"peak_gb": self.peak_gb, "reserved_gb": self.reserved_gb} if self.reserved_gb else {}),
            **{f"{term}/{source}": mean for term, source, mean in each if mean is not None},
            **{f"samples/{s}": n for s, n in zip(sources, self.counts, strict=True) if n},
            **({"skipped": sum(self.skipped)} if any(self.skipped) else {}),
            **{f"skipped/{s}": n for s, n in zip(sources, self.skipped, strict=True) if n},
            **({"bad_steps": bad_steps} if bad_steps else {}),
            **(self.spread if len(self.compute_seconds) > 1 else {}),
        }


@dataclass(frozen=True)
class _Pending:
    step: int
    terms: tuple[str, ...]
    lacking: set[str]
    shape: tuple[int, ...]
    flat: Tensor
    grad_norm: float
    lr: float
    times: StepTimes


class Reducer:
    """One all-reduce a step for losses, counts, times and signals; `take` reads the previous step's."""

    def __init__(self, device: torch.device, rank: int, ranks: int):
        self._device, self._rank, self._ranks = device, rank, ranks
        self._pending: _Pending | None = None

    def put(self, step: int, sums: StepSums, *, grad_norm: float, lr: float, times: StepTimes, signal: int = 0) -> None:
        """`signal`: number of the signal that requests this rank to stop, 0 for none."""
        values = sums.values
        finite = values.isfinite().all().double()
        said = [times.compute_seconds, float(signal), *self._memory()]
        own = torch.tensor(said, device=self._device, dtype=torch.float64)
        ranks = torch.zeros(_OF_RANK, self._ranks, device=self._device, dtype=torch.float64)
        ranks[:, self._rank] = torch.cat([own, 1 - finite.reshape(1)])
        flat = torch.cat([values.flatten(), ranks.flatten()])
        if dist.is_initialized():
            dist.all_reduce(flat)
        self._pending = _Pending(step, sums.terms, sums.lacking, tuple(values.shape), flat, grad_norm, lr, times)

    def _memory(self) -> tuple[float, float]:
        """Peak bytes allocated and reserved by the device's allocator since the last call."""
        if self._device.type != "cuda":
            return 0.0, 0.0
        found = torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return float(found[0]), float(found[1])

    def take(self) -> Reduced | None:
        if self._pending is None:
            return None
        now, self._pending = self._pending, None
        numbers = now.flat.tolist()
        cut = len(numbers) - _OF_RANK * self._ranks
        table = torch.tensor(numbers[:cut], dtype=torch.float64).reshape(now.shape)
        of_rank = [numbers[cut + i * self._ranks :][: self._ranks] for i in range(_OF_RANK)]
        compute_seconds, signals, peak, reserved, wrong = of_rank
        terms = len(now.terms)
        sums, there, count, skipped = table[:terms], table[terms:-2], table[-2], table[-1]
        losses = {t: (sums[i].sum() / there[i].sum()).item() for i, t in enumerate(now.terms) if there[i].any()}
        per_source = {
            t: [(total / n).item() if n else None for total, n in zip(sums[i], there[i], strict=True)]
            for i, t in enumerate(now.terms)
        }
        shares = {
            t: (
                (there[i].sum() / count.sum()).item(),
                [(n / all_).item() if all_ else None for n, all_ in zip(there[i], count, strict=True)],
            )
            for i, t in enumerate(now.terms)
            if t in now.lacking
        }
        return Reduced(
            step=now.step,
            losses=losses,
            per_source=per_source,
            shares=shares,
            counts=[int(c) for c in count.tolist()],
            grad_norm=now.grad_norm,
            lr=now.lr,
            seconds=now.times.seconds,
            data_wait=now.times.data_wait,
            skipped=[int(n) for n in skipped.tolist()],
            compute_seconds=compute_seconds,
            peak_gb=round(max(peak) / 1e9, 3),
            reserved_gb=round(max(reserved) / 1e9, 3),
            signals={rank: Signals(int(number)).name for rank, number in enumerate(signals) if number},
            not_finite=[rank for rank, flag in enumerate(wrong) if flag],
        )


class Stopwatch:
    """Seconds of a step: total, waiting for data, and before the rank first waited for others.

    On a GPU the last is measured by device events, as the host only queues work; it is read once the event has passed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._waiting_since: float | None = None
        self._met: Any = None
        self.reset()

    def reset(self) -> None:
        """Reset: the next step begins with its first phase."""
        self._start: float | None = None

    def enter(self, phase: Phase) -> None:
        """This rank begins `phase`. Before its first gradient is there, a rank waits for no other."""
        if self._start is None:
            self._begin_step()
        if self._waiting_since is not None:
            self._waited += time.perf_counter() - self._waiting_since
        self._waiting_since = time.perf_counter() if phase is Phase.WAITING else None
        if phase is Phase.DIFFERENTIATING and self._met is None:
            self._met = self._now()

    def step_done(self) -> StepTimes:
        """The times since the last step, or since the first phase after a reset."""
        assert self._start is not None, "a step has phases"
        seconds, waited = time.perf_counter() - self._start, self._waited
        compute_seconds = 0.0
        if self._met is not None:
            compute_seconds = self._begin.elapsed_time(self._met) / 1e3 if self._on_gpu else self._met - self._begin
        self._begin_step()
        return StepTimes(seconds, waited / max(seconds, 1e-9), compute_seconds)

    def _begin_step(self) -> None:
        self._start, self._waited, self._waiting_since = time.perf_counter(), 0.0, None
        self._begin, self._met = self._now(), None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
