"""Which lines of metrics.jsonl say that the newest checkpoint could not be saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from stamo_dist.checkpoint.save import Saved
from stamo_dist.run.state import RunState
from stamo_dist.training.hooks import CheckpointHook


class Journal:
    """The lines of a run that logs every `every` steps, each one step later, as `RunLogger` and `LogHook` do."""

    def __init__(self, every: int):
        self.lines: dict[int, dict[str, Any]] = {}
        self.signals: dict[int, str] = {}
        self.step_seconds, self.clock = 0.1, Mock()
        self._every, self._extra, self._pending = every, dict[str, Any](), 0

    def add_metrics(self, **values: Any) -> None:
        self._extra |= values

    def drop_metrics(self, *names: str) -> None:
        for name in names:
            self._extra.pop(name, None)

    def info(self, text: str) -> None:
        pass

    def sync(self) -> None:
        pass

    def flush(self, state: RunState) -> None:
        if self._pending and self._pending % self._every == 0:
            self.lines[self._pending], self._extra = self._extra, {}
        self._pending = 0

    def begin(self, step: int) -> None:
        self.flush(RunState(step))
        self._pending = step


def told(outcomes: dict[int, str | None], *, steps: int, every: int = 1, signal: int = 0) -> dict[int, list[str]]:
    """Step → what its line says of saves. `outcomes`: step of a save → why it failed; `signal`: when it is stopped."""
    journal = Journal(every)
    saver = Mock()
    saver.due = lambda step, last: "regular" if step in outcomes else None
    saver.poll = lambda wait=False: []
    saver.save = lambda state, kind, wait: [
        Saved(state.step, Path("x"), outcomes.get(state.step), seconds=1.0, stall=1.0, beside=False)
    ]
    trial = SimpleNamespace(steps=0, due=lambda step, seconds: False)
    evaluate = SimpleNamespace(saved=lambda step: False)
    watchdog = SimpleNamespace(mark=lambda *_: None, saving_takes=0.0)
    hook = CheckpointHook(saver, journal, evaluate, journal, watchdog, None, trial)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        journal.begin(step)
        journal.signals = {0: "SIGTERM"} if step == signal else {}
        hook.after_step(RunState(step), None)  # type: ignore[arg-type]
    return {step: sorted(key for key in line if key != "save_stall") for step, line in journal.lines.items() if line}


def test_each_line_until_a_save_succeeds_also_those_of_the_tries() -> None:
    failed, saved = ["save_failed"], ["save_seconds"]
    full = "no space"
    assert told({2: full, 4: full, 7: None}, steps=9) == {**dict.fromkeys(range(3, 8), failed), 8: saved}
    assert told({5: full, 6: None}, steps=9, every=4) == {8: saved}
    assert told({2: full, 5: None}, steps=5, signal=5) == dict.fromkeys((3, 4), failed)
    assert told({2: full, 3: None}, steps=3, signal=3) == {}
