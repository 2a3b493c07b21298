"""The loop's interface to evaluation during training."""

from __future__ import annotations

from collections.abc import Callable, Collection

from stamo_dist.tracking.logger import RunLogger


class Evaluation:
    """Evaluates saved checkpoints as the recipe's `evaluate` says; this base class does nothing.

    Rank 0 has one. It is called between steps, in the order begin, (saved | poll)…, finish, close.
    """

    def pending(self, step: int) -> bool:
        """Whether a run that finished training at `step` has results left to measure or log."""
        return False

    def begin(self, step: int, logger: RunLogger) -> None:
        """The loop continues after `step`, at a start or after a rollback."""

    def saved(self, step: int) -> bool:
        """The checkpoint of `step` is complete. Returns whether training was blocked for it."""
        return False

    def poll(self) -> None:
        """Called between two steps; must not block."""

    def needed(self) -> Collection[int]:
        """Steps whose checkpoints must be kept."""
        return ()

    def finish(self, stopped: Callable[[], bool]) -> bool:
        """After training and export: wait for running measurements until `stopped`; returns whether all are logged."""
        return True

    def close(self) -> None:
        """This start of the run ends, for any reason."""
