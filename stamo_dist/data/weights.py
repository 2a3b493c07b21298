"""Requested against realised shares of a mixture's sources."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from stamo_dist.data.mixture import Mixture

#: More passes over a source than this in one run cause a warning.
MANY_EPOCHS = 100
#: A source sampled less than once in this many batches is starved.
FEW_BATCHES = 100


@dataclass(frozen=True)
class Share:
    """One source in a run."""

    source: str
    frames: int  # over the cameras used
    requested: float  # share of the samples from the weights, averaged over the run
    realised: float  # realised share of the run's samples
    samples: int  # samples that the run reads
    unique: int  # distinct ones among them
    epochs: float  # passes of the run over the source
    warnings: list[str] = field(default_factory=list)


def report(mixture: Mixture, steps: int) -> list[Share]:
    """One Share per source of `mixture`, over a run of `steps` optimizer steps."""
    schedule = mixture.schedule
    total = mixture.batches.before(steps)
    seen = schedule.counts(total)
    ends = np.append(schedule.starts[1:], max(total, schedule.starts[-1]))
    lengths = np.clip(np.minimum(ends, total) - schedule.starts, 0, None)
    asked = np.array([_shares(mixture, start) for start in schedule.starts])
    requested = (asked * lengths[:, None]).sum(0) / max(1.0, lengths.sum())
    found = []
    for i, name in enumerate(mixture.sources):
        share, frames = seen[i] / max(1, seen.sum()), int(mixture.frames[i])
        warnings = []
        if seen[i] / frames > MANY_EPOCHS:
            warnings.append(
                f"the run goes through it {seen[i] / frames:.0f} times: lower its weight, add data, or set max_epochs"
            )
        if not seen[i]:
            warnings.append("its weight is too small for a single sample of the run: raise it or leave the source out")
        elif share * total / steps * FEW_BATCHES < 1:
            warnings.append(f"one sample in {steps / (share * total):.0f} batches: raise its weight")
        limit = mixture.data.sources[name].max_epochs
        if limit is not None and seen[i] >= int(limit * frames):
            warnings.append(f"used up by max_epochs ({limit:g}): the other sources take its part then")
        found.append(
            Share(
                source=name,
                frames=frames,
                requested=float(requested[i]),
                realised=float(share),
                samples=int(seen[i]),
                unique=min(int(seen[i]), frames),
                epochs=float(seen[i] / frames),
                warnings=warnings,
            )
        )
    return found


def _shares(mixture: Mixture, at: float) -> np.ndarray:
    """Shares given by the weights alone at sample `at`, ignoring exhausted sources."""
    step, weights = mixture.batches.batches(int(at)), []
    for name, frames in zip(mixture.sources, mixture.frames.tolist(), strict=True):
        steps = mixture.data.sources[name].weights(frames)
        weights.append(steps[max(k for k in steps if k <= step)] ** (1 / mixture.data.temperature))
    return np.array(weights) / sum(weights)
