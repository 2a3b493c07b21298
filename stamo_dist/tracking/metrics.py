"""Metrics of a run: reduced over ranks in one collective a step, written to metrics.jsonl first, then W&B.

Each step's numbers begin their way to the host when they are reduced and are read one step later, so neither the host
nor the device waits for the other.
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

from stamo_dist.device import Device, DeviceEvent, Fetched
from stamo_dist.distributed.engine import Phase
from stamo_dist.distributed.rank import few_of

_OF_RANK = 7  # numbers that each rank says of itself


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
    """One step on one rank, as `Stopwatch` measures it."""

    seconds: float
    data_wait: float  # share of the seconds
    compute_seconds: float
    comm_wait: float  # share of the seconds


@dataclass(frozen=True)
class Reduced:
    """One step over all ranks; `grad_norm`, `rates` and `seconds` are this rank's, and the same on all."""

    step: int
    losses: dict[str, float]  # mean of each term over the samples that have it; without terms that no sample has
    per_source: dict[str, list[float | None]]  # the same by source
    #: The terms that samples may lack → share of the samples that have it, and the same by source.
    shares: dict[str, tuple[float, list[float | None]]]
    counts: list[int]  # samples, per source
    grad_norm: float
    rates: Mapping[str, float]  # "lr", and lr/NAME of parameters with a learning rate of their own
    seconds: float
    data_wait: float  # StepTimes.data_wait of the rank that waited longest
    comm_wait: float  # mean of the ranks' StepTimes.comm_wait
    skipped: list[int]  # samples whose frames could not be read, per source
    compute_seconds: list[float]  # each rank's StepTimes.compute_seconds
    peak_gb: float  # most memory since the step before on any rank's device, allocated and reserved; 0 on a CPU
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
            **self.rates,
            "samples_per_second": round(rate, 3),
            "data_wait": round(self.data_wait, 4),
            **({"comm_wait": round(self.comm_wait, 4)} if len(self.compute_seconds) > 1 else {}),
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
    flat: Fetched
    grad_norm: float
    rates: Mapping[str, float]
    times: StepTimes


class Reducer:
    """One all-reduce a step for losses, counts, times and signals; `take` reads the previous step's."""

    def __init__(self, device: Device, rank: int, ranks: int):
        self._device, self._rank, self._ranks = device, rank, ranks
        self._pending: _Pending | None = None

    def put(
        self,
        step: int,
        sums: StepSums,
        *,
        grad_norm: float,
        rates: Mapping[str, float],
        times: StepTimes,
        signal: int = 0,
    ) -> None:
        """`signal`: number of the signal that requests this rank to stop, 0 for none."""
        values = sums.values
        finite = values.isfinite().all().double()
        said = [times.compute_seconds, times.data_wait, times.comm_wait, float(signal), *self._device.peak_memory()]
        own = self._device.upload(torch.tensor(said, dtype=torch.float64))
        ranks = torch.zeros(_OF_RANK, self._ranks, device=values.device, dtype=torch.float64)
        ranks[:, self._rank] = torch.cat([own, 1 - finite.reshape(1)])
        flat = torch.cat([values.flatten(), ranks.flatten()])
        if dist.is_initialized():
            dist.all_reduce(flat)
        coming, shape = self._device.fetch(flat), tuple(values.shape)
        self._pending = _Pending(step, sums.terms, sums.lacking, shape, coming, grad_norm, rates, times)

    def take(self) -> Reduced | None:
        if self._pending is None:
            return None
        now, self._pending = self._pending, None
        numbers = now.flat.wait().tolist()
        cut = len(numbers) - _OF_RANK * self._ranks
        table = torch.tensor(numbers[:cut], dtype=torch.float64).reshape(now.shape)
        of_rank = [numbers[cut + i * self._ranks :][: self._ranks] for i in range(_OF_RANK)]
        compute_seconds, data_wait, comm_wait, signals, peak, reserved, wrong = of_rank
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
            rates=now.rates,
            seconds=now.times.seconds,
            data_wait=max(data_wait),
            comm_wait=sum(comm_wait) / self._ranks,
            skipped=[int(n) for n in skipped.tolist()],
            compute_seconds=compute_seconds,
            peak_gb=round(max(peak) / 1e9, 3),
            reserved_gb=round(max(reserved) / 1e9, 3),
            signals={rank: Signals(int(number)).name for rank, number in enumerate(signals) if number},
            not_finite=[rank for rank, flag in enumerate(wrong) if flag],
        )


class Stopwatch:
    """Times of a step, from the phases that a rank enters.

    - `data_wait`: in `Phase.WAITING`, on the host.
    - `compute_seconds`: from the step's begin to its first backward pass. Nothing before it waits for other ranks, but
      for the weights that fsdp, hsdp and zero3 gather in the forward pass.
    - `comm_wait`: in `Phase.REDUCING` of the last micro-batch: from the moment this rank has computed all its own
      gradients until those reduced over the ranks are there. It is the transfer that no computation hides, and the
      wait for slower ranks. Not in it: what was waited for before (gathers of fsdp, hsdp and zero3; zero's buckets
      without overlap, which is so on a CPU) and after (the norm, zero's gather of the updated weights).

    On a GPU, where the host only hands out work, the last two are taken there from events, which the device has passed
    when the step's gradient norm is known.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._waiting_since: float | None = None
        self._at: dict[Phase, _Moment] = {}
        self.reset()

    def reset(self) -> None:
        """Reset: the next step begins with its first phase."""
        self._start: float | None = None

    def enter(self, phase: Phase) -> None:
        """This rank begins `phase`; of each the first counts."""
        if self._start is None:
            self._begin_step()
        if self._waiting_since is not None:
            self._waited += time.perf_counter() - self._waiting_since
        self._waiting_since = time.perf_counter() if phase is Phase.WAITING else None
        if phase not in self._at and phase in _TIMED:
            self._at[phase] = _Moment(self._device)

    def step_done(self) -> StepTimes:
        """The times since the last step, or since the first phase after a reset."""
        assert self._start is not None, "a step has phases"
        seconds, waited, at = max(time.perf_counter() - self._start, 1e-9), self._waited, self._at
        met = at.get(Phase.DIFFERENTIATING, self._begin)
        reduced = at.get(Phase.UPDATING, met)
        times = StepTimes(
            seconds,
            data_wait=waited / seconds,
            compute_seconds=met.since(self._begin),
            comm_wait=reduced.since(at.get(Phase.REDUCING, reduced)) / seconds,
        )
        self._begin_step()
        return times

    def _begin_step(self) -> None:
        self._start, self._waited, self._waiting_since = time.perf_counter(), 0.0, None
        self._begin, self._at = _Moment(self._device), {}


_TIMED = (Phase.DIFFERENTIATING, Phase.REDUCING, Phase.UPDATING)


class _Moment:
    """When the device comes to what is handed out from now on."""

    def __init__(self, device: Device) -> None:
        self._event: DeviceEvent | None = device.event()
        self._time = time.perf_counter()

    def since(self, before: _Moment) -> float:
        """Seconds; waits until the device has passed both."""
        if self._event is None or before._event is None:
            return self._time - before._time
        self._event.synchronize()
        return before._event.elapsed_time(self._event) / 1e3
