"""In words, that a run has nothing left to train."""

from __future__ import annotations

from pathlib import Path


def beyond(run: Path, step: int, steps: int) -> list[str]:
    """A note if the run is further than the recipe asks."""
    return [f"{run}: is at step {step}, beyond train.steps ({steps}): nothing is trained"] if step > steps else []


def already_trained(run: Path, step: int, steps: int) -> str:
    """What a start of a run that is at its end says."""
    return "".join(beyond(run, step, steps)) or f"{run}: already trained to step {step}"
