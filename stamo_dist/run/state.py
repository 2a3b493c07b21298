"""Where a run stands: what a checkpoint keeps beside weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunState:
    """Where a run stands after an optimizer step."""

    step: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    samples: list[int] = field(default_factory=list)  # seen so far, per source
    skipped: list[int] = field(default_factory=list)  # of these, replaced by others as they could not be read
    seconds: float = 0.0  # of training, over all restarts
    bad_steps: int = 0  # steps without an update, as their loss or gradient was not finite
    bad_in_a_row: int = 0  # the last so many steps were bad

    @property
    def updates(self) -> int:
        """Steps that changed the weights."""
        return self.step - self.bad_steps

    def advance(self, cursor: dict[str, Any], *, good: bool) -> None:
        """A step was made on the batch that ends at `cursor`; `good`: with an update."""
        self.step, self.cursor = self.step + 1, cursor
        self.bad_steps += not good
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
