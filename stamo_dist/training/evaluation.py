"""What the loop knows of measuring while it trains: when to call, and nothing of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Collection

from stamo_dist.tracking.logger import RunLogger


class Evaluation:
    """Measures what was saved, as the recipe's `evaluate` says; this one, of a recipe that asks for none, nothing.

    Rank 0 has one. It is called between steps, in the order begin, (saved | poll)…, finish, close.
    """

    def pending(self, step: int) -> bool:
        """Whether a run that was trained to its end at `step` has something left to measure or to tell."""
        return False

    def begin(self, step: int, logger: RunLogger) -> None:
        """The loop goes on after `step`, at a start or after a rollback."""

    def saved(self, step: int) -> bool:
        """The checkpoint of `step` is whole. Returns whether training stood still for it."""
        return False

    def poll(self) -> None:
        """Between two steps; must not wait."""

    def needed(self) -> Collection[int]:
        """Steps whose checkpoints must stay."""
        return ()

    def finish(self, stopped: Callable[[], bool]) -> bool:
        """Trained to the end and exported: wait for what is still measured until `stopped`; whether all is told."""
        return True

    def close(self) -> None:
        """This start of the run ends, in whatever way."""
