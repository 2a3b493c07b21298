"""The learning rate of every optimizer step, also of a run whose schedule was changed on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from stamo_dist.errors import RunError
from stamo_dist.recipe.schema import Recipe


@dataclass(frozen=True)
class RateSchedule:
    """Learning rate by 1-based optimizer update.

    Attributes:
        shape: `optimizer.schedule`.
        lr: Peak learning rate.
        warmup: Updates of linear warm-up.
        final: Rate at the end of a decay, relative to the peak.
        decay: Updates of wsd's decay.
        steps: The last update.
        begin, rate: A schedule that was changed at update `begin` starts at `rate`, which is its peak; (0, None)
            otherwise.
    """

    shape: str
    lr: float
    warmup: int
    final: float
    decay: int
    steps: int
    begin: int = 0
    rate: float | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> RateSchedule:
        """The schedule of a run that begins with this recipe."""
        o, steps = recipe.optimizer, recipe.train.steps
        return cls(o.schedule, o.lr, o.warmup_steps, o.final_lr, o.decay_of(steps), steps)

    def at(self, update: int) -> float:
        """Learning rate of an update."""
        if self.rate is None and update <= self.warmup:
            return self.lr * update / self.warmup
        begin, peak = (self.warmup, self.lr) if self.rate is None else (self.begin, self.rate)
        if self.shape == "constant":
            return peak
        if self.shape == "inverse_sqrt":
            return peak * math.sqrt(max(1, begin) / max(1, begin, update))
        if self.shape == "wsd":
            begin = max(begin, self.steps - self.decay)
        progress = min(1.0, max(0.0, (update - begin) / max(1, self.steps - begin)))
        if self.shape == "cosine":
            progress = 1 - 0.5 * (1 + math.cos(math.pi * progress))
            return peak * (self.final + (1 - self.final) * (1 - progress))
        return peak * (1 - (1 - self.final) * progress)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RateSchedule:
        return cls(**fields)


def continued(before: RateSchedule, recipe: Recipe, updates: int) -> tuple[RateSchedule, list[str]]:
    """The schedule of a run that goes on after `updates` updates under `before`; and notes if it is another one.

    With `optimizer.schedule_from: here` a changed schedule starts at the rate reached. It stays there in later starts.

    Raises:
        RunError: It is another one, and its decay is longer than what is left.
    """
    asked, here = RateSchedule.of(recipe), recipe.optimizer.schedule_from == "here"
    if replace(before, begin=0, rate=None) == asked and (here or before.rate is None):
        return before, []
    left = max(0, asked.steps - updates)
    if asked.shape == "wsd" and updates and left < asked.decay:
        raise RunError(
            f"optimizer.decay_steps: {asked.decay} are more than the {left} steps left ({updates} of {asked.steps} are "
            "trained); set fewer, or more train.steps"
        )
    was, reached = before.at(updates + 1), before.at(max(1, updates))
    if here and updates:
        after = replace(asked, begin=updates, rate=reached)
        said = f"the new schedule starts at the rate reached, {reached:.4g} (optimizer.schedule_from: here)"
        return after, [f"learning rate: {said}"]
    if math.isclose(asked.at(updates + 1), was, rel_tol=1e-9) or not updates:
        return asked, []
    now = asked.at(updates + 1)
    note = f"learning rate: {reached:.4g} at step {updates}, then {now:.4g} by the changed schedule (before: {was:.4g})"
    way = "; --set optimizer.schedule_from=here starts it at the rate reached" if now > was else ""
    return asked, [note + way]
