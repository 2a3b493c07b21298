"""Requested against realised shares of a mixture's sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from stamo_dist.data.mixture import Mixture

#: A sample drawn more often than this in one epoch of the mixture is worth a warning.
MANY_REPEATS = 10
#: A source that is met less than once in this many batches is starved.
FEW_BATCHES = 100


@dataclass(frozen=True)
class Share:
    """One source in a run."""

    source: str
    frames: int  # over the cameras used
    requested: float  # share of the samples, from the weights
    realised: float  # share of the samples the run really reads
    samples: int  # that the run reads
    epochs: float  # times the run goes through the source
    repeats: int  # most times one sample is drawn in one epoch of the mixture
    warnings: list[str] = field(default_factory=list)


def per_source(mixture: Mixture, per_stream: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum a count over the cameras of each source."""
    total = np.zeros(len(mixture.sources), np.int64)
    np.add.at(total, mixture.stream_source, per_stream)
    return total


def report(mixture: Mixture, seen: NDArray[np.int64]) -> list[Share]:
    """One Share per source of `mixture`, when a run reads `seen` (sources,) samples of them."""
    weights = np.array([mixture.data.sources[name].weight for name in mixture.sources])
    requested = weights / weights.sum()
    frames = per_source(mixture, mixture.frames)
    chosen = per_source(mixture, mixture.chosen)
    most = np.zeros(len(mixture.sources), np.int64)
    np.maximum.at(most, mixture.stream_source, -(-mixture.chosen // mixture.frames))
    shares = []
    for i, name in enumerate(mixture.sources):
        warnings = []
        if most[i] > MANY_REPEATS:
            warnings.append(
                f"one sample is drawn up to {most[i]} times per epoch of the mixture: lower its weight, add data, or "
                "lower data.epoch_samples"
            )
        share = chosen[i] / mixture.epoch_size
        if not chosen[i]:
            warnings.append("its weight is too small for a single sample per epoch: raise it or leave the source out")
        elif share * mixture.global_batch * FEW_BATCHES < 1:
            warnings.append(f"one sample in {1 / (share * mixture.global_batch):.0f} batches: raise its weight")
        shares.append(
            Share(
                source=name,
                frames=int(frames[i]),
                requested=float(requested[i]),
                realised=float(seen[i] / max(1, seen.sum())),
                samples=int(seen[i]),
                epochs=float(seen[i] / frames[i]),
                repeats=int(most[i]),
                warnings=warnings,
            )
        )
    return shares
