"""Rollouts of a policy's checkpoints during training, in a separate process or job.

`RUN/eval/during/step_00001000/` is one rollout: `request.json` has its checkpoint and process or job, `rollout.json`
its result, `failed.json` the reason if it failed, `told` marks that metrics.jsonl has the result. The training keeps
no other record of rollouts, so that a new start finds everything there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from stamo_dist.checkpoint.retention import folder_of
from stamo_dist.evaluate import curve
from stamo_dist.evaluate.weights import digest
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, write_atomic
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.training.evaluation import Evaluation
from stamo_dist.words import counted

_LOOK = 0.5  # seconds between polls of the running rollout
Ticket = dict[str, Any]  # JSON that identifies a started command; `log` is the path of its output


class Launcher(Protocol):
    """Starts rollouts. Its methods may be slow, so they are called in another thread."""

    stays: bool  # whether its commands continue after the training has ended

    def start(self, arguments: Sequence[str], folder: Path) -> Ticket:
        """Run `stamo ARGUMENTS` unless it is already running; `folder` is the rollout's."""

    def alive(self, ticket: Ticket) -> bool: ...

    def stop(self, ticket: Ticket) -> None: ...


@dataclass
class _Running:
    step: int
    ticket: Ticket | None = None  # None until it has started
    asked: Future[Any] | None = None  # result of starting it or of asking whether it is alive
    looked: float = 0.0


class BackgroundRollouts(Evaluation):
    """Runs one rollout at a time; of the checkpoints due meanwhile, only the newest is rolled out next."""

    def __init__(self, run: RunFolder, recipe: Recipe, launcher: Launcher):
        self._run, self._recipe, self._launcher = run, recipe, launcher
        self._running: _Running | None = None
        self._waiting: int | None = None
        self._thread = ThreadPoolExecutor(1, "rollouts")

    def pending(self, step: int) -> bool:
        steps = [at for at in curve.steps(self._run) if at <= step]
        done = {at for at in steps if curve.result(self._run, at) is not None}
        return bool(self._unlogged_steps(done)) or any(
            not (self._launcher.stays or self._failed(at)) for at in steps if at not in done
        )

    def begin(self, step: int, logger: RunLogger) -> None:
        self._logger = logger
        with self._at_no_cost():
            self._begin(step)

    def _begin(self, step: int) -> None:
        self._discard_after(step)
        unfinished = []
        found = {at: curve.result(self._run, at) for at in curve.steps(self._run) if at not in self.needed()}
        untold = self._unlogged_steps({at for at, result in found.items() if result is not None})
        for at, result in found.items():
            request = self._request(at)
            if result is not None:
                if at in untold:
                    self._log_result(at, result)
                self._told(at).touch()
            elif request is not None and not self._failed(at):
                if digest(folder_of(self._run.checkpoints, at)) == request["checkpoint"]:
                    unfinished.append((at, request.get("ticket")))
                else:
                    self._say(f"step {at} is not rolled out: its checkpoint is no longer there")
                    self._drop(at)
        for at, ticket in sorted(unfinished, key=lambda found: (found[1] is None, found[0])):
            if self._running is None and ticket is not None:
                self._running = _Running(at)
                self._ask(self._running, partial(self._resume, at, ticket))
            else:
                self._queue(at)
        self.saved(step)
        curve.write(self._run, self._recipe)

    def saved(self, step: int) -> bool:
        every, checkpoint = self._recipe.evaluate.every, digest(folder_of(self._run.checkpoints, step))
        if not every or not step or step % every or checkpoint is None:
            return False
        known = (self._request(step) or {}).get("checkpoint") == checkpoint
        if known and (curve.result(self._run, step) or step in self.needed()):
            return False
        if not known:
            self._drop(step)
        with self._at_no_cost():
            folder = self._folder(step)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "failed.json").unlink(missing_ok=True)  # a new start retries the newest once
            write_atomic(folder / "request.json", json.dumps({"checkpoint": checkpoint}) + "\n")
            self._queue(step)
        return False

    def poll(self) -> None:
        with self._at_no_cost():
            self._poll()

    @contextmanager
    def _at_no_cost(self) -> Iterator[None]:
        """Errors of the disk, such as a full one, are logged and do not end the training."""
        try:
            yield
        except OSError as e:
            self._say(f"rollouts beside the training: {e.filename or 'the run folder'}: {e.strerror}")

    def _poll(self) -> None:
        running = self._running
        if running is None:
            return
        if running.asked is None:
            if time.monotonic() > running.looked + _LOOK:
                running.looked = time.monotonic()
                assert running.ticket is not None, "what is started has one"
                self._ask(running, partial(self._launcher.alive, running.ticket))
            return
        if not running.asked.done():
            return
        error, asked = running.asked.exception(), running.asked
        running.asked = None
        if running.ticket is None and error is None:
            running.ticket = asked.result()
            self._note(running.step, running.ticket)
        elif running.ticket is None:
            self._fail(running.step, f"{error}", None)
        elif error is None and not asked.result():
            self._ended(running.step, running.ticket)

    def needed(self) -> set[int]:
        running = self._running.step if self._running is not None else None
        return {step for step in (running, self._waiting) if step is not None}

    def finish(self, stopped: Callable[[], bool]) -> bool:
        said = False
        while self.needed() and not stopped():
            self.poll()
            running = self._running
            if running and running.ticket and self._launcher.stays:
                if self._waiting is None:
                    self._say(f"step {running.step} is rolled out by {_name(running.ticket)}, which goes on")
                    return True
                self._running = None  # the rollout continues, too
                self._start()
            elif running and not said:
                said = True
                self._say(f"trained to the end; waiting for the rollout of step {max(self.needed())}")
            time.sleep(0.1)
        return not self.needed()

    def close(self) -> None:
        running, stays = self._running, self._launcher.stays
        self._thread.shutdown(wait=not stays, cancel_futures=True)
        if self.needed() and not stays:
            left = ", ".join(map(str, sorted(self.needed())))
            self._say(f"the rollout of step {left} goes on at the next start")
        if running is not None and not stays:
            ticket = running.ticket
            if ticket is None and running.asked is not None and running.asked.done() and not running.asked.cancelled():
                ticket = None if running.asked.exception() else running.asked.result()
            if ticket is not None:
                self._launcher.stop(ticket)

    def _queue(self, step: int) -> None:
        if self._running is None:
            self._waiting = step
            self._start()
            return
        if self._waiting is not None:
            self._say(f"step {self._waiting} is not rolled out: step {self._running.step} still is")
            self._drop(self._waiting)
        self._waiting = step

    def _start(self) -> None:
        step, self._waiting = self._waiting, None
        if step is not None:
            self._running = _Running(step)
            self._ask(self._running, partial(self._launch, step))

    def _launch(self, step: int) -> Ticket:
        return self._launcher.start(["eval", "during", str(self._run.path.absolute()), str(step)], self._folder(step))

    def _resume(self, step: int, ticket: Ticket) -> Ticket:
        """Resume watching a rollout of an earlier start, or start a new one in its place."""
        return ticket if self._launcher.alive(ticket) else self._launch(step)

    def _ask(self, running: _Running, question: Callable[[], Any]) -> None:
        running.asked = self._thread.submit(question)

    def _ended(self, step: int, ticket: Ticket) -> None:
        result = curve.result(self._run, step)
        if result is None:
            self._fail(step, curve.reason(Path(ticket["log"])), ticket)
            return
        self._running = None
        self._start()
        self._log_result(step, result)
        curve.write(self._run, self._recipe)

    def _fail(self, step: int, why: str, ticket: Ticket | None) -> None:
        first, log = (why.splitlines() or ["no reason is known"])[0], f"; see {ticket['log']}" if ticket else ""
        self._say(f"step {step} could not be rolled out: {first}{log}")
        self._running = None
        self._start()
        write_atomic(self._folder(step) / "failed.json", json.dumps({"why": why}) + "\n")

    def _log_result(self, step: int, result: dict[str, Any]) -> None:
        """Log the result of a step, exactly once over all starts of the run."""
        success, numbers = curve.numbers(step, result)
        self._logger.log_late_eval(step, numbers)
        self._told(step).touch()
        self._say(f"success in closed loop {success}: {counted(success.trials, 'trial')}")

    def _unlogged_steps(self, steps: set[int]) -> set[int]:
        """Steps whose result is not in metrics.jsonl, which is read only if some are not marked.

        Such steps are left by a start that was killed between logging and marking, or by an earlier version.
        """
        unmarked = {step for step in steps if not self._told(step).exists()}
        return unmarked - RunLogger.late_steps_of(self._run) if unmarked else set()

    def _told(self, step: int) -> Path:
        return self._folder(step) / "told"

    def _discard_after(self, step: int) -> None:
        """Stop and delete rollouts of steps after this one, whose weights were rolled back."""
        if self._waiting is not None and self._waiting > step:
            self._waiting = None
        if self._running is not None and self._running.step > step:
            if self._running.ticket is not None:
                self._thread.submit(self._launcher.stop, self._running.ticket)
            self._running = None
        for at in curve.steps(self._run):
            if at > step:
                ticket = (self._request(at) or {}).get("ticket")
                if ticket is not None and curve.result(self._run, at) is None:
                    self._thread.submit(self._launcher.stop, ticket)
                self._drop(at)

    def _drop(self, step: int) -> None:
        shutil.rmtree(self._folder(step), ignore_errors=True)

    def _note(self, step: int, ticket: Ticket) -> None:
        request = self._request(step) or {}
        write_atomic(self._folder(step) / "request.json", json.dumps({**request, "ticket": ticket}) + "\n")

    def _request(self, step: int) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._folder(step) / "request.json").read_text())
        except (OSError, ValueError):
            return None
        return found if "checkpoint" in found else None

    def _failed(self, step: int) -> bool:
        return (self._folder(step) / "failed.json").is_file()

    def _folder(self, step: int) -> Path:
        return curve.folder(self._run, step)

    def _say(self, text: str) -> None:
        self._logger.info(text)


def _name(ticket: Ticket) -> str:
    return f"job {ticket['job']}" if "job" in ticket else "a process of its own"
