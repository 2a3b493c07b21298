"""`success.json` of a policy's run: closed-loop success of its checkpoints, the newest measured and the best.

Free of torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stamo_dist.run.folder import RunFolder, write_atomic

KEY = "eval/rollout"


@dataclass(frozen=True)
class Success:
    """Success rate (%) over all trials of one step's weights, with its 95 % interval."""

    step: int
    success: float
    low: float
    high: float
    trials: int

    def __str__(self) -> str:
        return f"{self.success:.0f} % ({self.low:.0f}–{self.high:.0f}) at step {self.step}"


@dataclass(frozen=True)
class Successes:
    last: Success | None = None
    best: Success | None = None

    @classmethod
    def read(cls, run: Path) -> Successes:
        """The successes of a run; empty if the file is missing or damaged."""
        try:
            found = json.loads(RunFolder(run).success.read_text())
            return cls(*(None if found[k] is None else Success(**found[k]) for k in ("last", "best")))
        except (OSError, ValueError, KeyError, TypeError):
            return cls()

    def write(self, run: Path) -> None:
        write_atomic(RunFolder(run).success, json.dumps(asdict(self)) + "\n")


def is_late(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is a later measurement of a step rather than the step's own line."""
    return len(line) > 1 and all(key == "step" or key.startswith(f"{KEY}/") for key in line)


def best_of(found: Sequence[Success]) -> Success | None:
    """The highest rate; of equal ones the newest."""
    return max(found, key=lambda s: (s.success, s.step), default=None)
