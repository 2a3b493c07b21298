"""Errors a user can act on: every message names the field, file or sample at fault and the fix.

The command line prints them without a traceback and exits with code 2.
"""

from __future__ import annotations

from collections.abc import Sequence


class StamoError(Exception):
    """Base of every error caused by input rather than by a bug."""


class RecipeError(StamoError):
    """One or more problems in a recipe, all reported at once."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        head = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{head} in the recipe:", *(f"  - {p}" for p in self.problems)]))


class DataError(StamoError):
    """Shards, samples or source files that are missing, corrupt or of the wrong shape."""


class CheckpointError(StamoError):
    """A checkpoint or weights folder that is missing, incomplete or does not fit the model."""


class RunError(StamoError):
    """A run folder or a set of processes that cannot be used as asked."""


def one_line(error: BaseException) -> str:
    """The error in one line: of a list of problems the first, of an error that is none of a user's its kind, too."""
    first, *more = str(error).splitlines() or [""]
    if isinstance(error, StamoError):
        return more[0].strip(" -") if first.endswith(":") and more else first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
