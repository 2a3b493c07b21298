"""Metrics of a run: reduced over ranks in one collective a step, written to metrics.jsonl first, then W&B.

Values are read on the host one step after they were computed, so logging never makes the device wait.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stamo_dist.recipe.schema import Recipe


@dataclass
class StepSums:
    """Sums over the samples of one optimizer step on this rank: loss terms and counts, per source."""

    terms: tuple[str, ...]
    values: Tensor  # (terms + 1, sources), the last row counts samples

    @classmethod
    def empty(cls, terms: Sequence[str], sources: int, device: torch.device) -> StepSums:
        return cls(tuple(terms), torch.zeros(len(terms) + 1, sources, device=device, dtype=torch.float32))

    def add(self, per_sample: dict[str, Tensor], source: Tensor) -> None:
        """`per_sample`: term → (B,); `source`: (B,) int64."""
        rows = torch.stack([*(per_sample[t].detach().float() for t in self.terms), torch.ones_like(source).float()])
        self.values.index_add_(1, source, rows)


@dataclass
class Reduced:
    """What all ranks agree on about one step."""

    step: int
    losses: dict[str, float]
    per_source: list[float | None]  # mean of the first term
    counts: list[int]  # samples, per source
    grad_norm: float
    seconds: float
    data_wait: float  # share of the seconds spent waiting for data
    skipped: int  # samples whose frames could not be read
    stop: bool


class Reducer:
    """One all-reduce a step for losses, counts and the stop flag; `take` reads the previous step's."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pending: tuple[int, tuple[str, ...], tuple[int, ...], Tensor, Tensor, tuple[float, float]] | None = None

    def put(
        self, step: int, sums: StepSums, grad_norm: Tensor, stop: bool, lap: tuple[float, float], skipped: int = 0
    ) -> None:
        flat = torch.cat([sums.values.flatten(), torch.tensor([float(skipped), float(stop)], device=self._device)])
        if dist.is_initialized():
            dist.all_reduce(flat)
        self._pending = (step, sums.terms, tuple(sums.values.shape), flat, grad_norm.detach().float(), lap)

    def take(self) -> Reduced | None:
        if self._pending is None:
            return None
        step, terms, shape, flat, norm, (seconds, wait) = self._pending
        self._pending = None
        *values, skipped, stop, grad_norm = torch.cat([flat, norm.reshape(1)]).tolist()
        table = torch.tensor(values, dtype=torch.float64).reshape(shape)
        count, sums = table[-1], table[:-1]
        total = count.sum().item()
        return Reduced(
            step=step,
            losses={t: sums[i].sum().item() / total for i, t in enumerate(terms)},
            per_source=[(sums[0, s] / count[s]).item() if count[s] else None for s in range(shape[1])],
            counts=[int(c) for c in count.tolist()],
            grad_norm=grad_norm,
            seconds=seconds,
            data_wait=wait,
            skipped=int(skipped),
            stop=stop > 0,
        )


class MetricsFile:
    """Appends JSON lines; on resumption drops the lines of steps that will be run again."""

    def __init__(self, path: Path, resumed_step: int):
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= resumed_step]
            tmp = path.with_suffix(".jsonl.tmp")
            tmp.write_text("".join(line + "\n" for line in lines))
            tmp.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
        return float("inf")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if _step(line) != float("inf")]


class WandB:
    """A W&B run that keeps its id over restarts; does nothing when tracking is off."""

    def __init__(self, recipe: Recipe, folder: Path, resolved: dict[str, Any]):
        self._run: Any = None
        if recipe.tracking.wandb == "off":
            return
        import wandb

        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            id=id_file.read_text().strip(),
            resume="allow",
            mode=recipe.tracking.wandb,
            project=recipe.tracking.project,
            entity=recipe.tracking.entity,
            tags=recipe.tracking.tags,
            name=recipe.name,
            dir=str(folder),
            config=resolved,
        )

    def log(self, line: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path))}, step=step)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()


class Stopwatch:
    """Seconds of a step, and how many of them waited for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.waited = 0.0
        self._start = time.perf_counter()

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap and the share of them spent waiting for data."""
        seconds, waited = time.perf_counter() - self._start, self.waited
        self.reset()
        return seconds, waited / max(seconds, 1e-9)
