"""The progress of a run, stored in a checkpoint beside weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """The progress of a run after an optimizer step."""

    step: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)  # samples seen so far, per source
    skipped: list[int] = field(default_factory=list)  # of these, unreadable ones that were replaced
    seconds: float = 0.0  # seconds of training, over all restarts
    bad_steps: int = 0  # steps without update because loss or gradient was not finite
    bad_in_a_row: int = 0  # number of most recent consecutive bad steps
    schedule: dict[str, Any] = field(default_factory=dict)  # `RateSchedule.to_dict`; {} in early checkpoints

    @property
    def updates(self) -> int:
        """Steps that changed the weights."""
        return self.step - self.bad_steps

    def advance(self, cursor: dict[str, Any], *, good: bool) -> None:
        """Record a step on the batch that ends at `cursor`; `good`: with an update."""
        self.step, self.cursor = self.step + 1, cursor
        self.bad_steps += not good
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
