"""Trials of an agent in simulators: one process per simulator, one agent in this process, one file per trial."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from stamo_dist.errors import DataError
from stamo_dist.evaluate.simulators import Observation, Setting, Simulator, SimulatorCatalogue
from stamo_dist.run.folder import write_atomic

#: Maximum frames of a video; for longer trials every second, fourth, … is kept.
VIDEO_FRAMES = 96
Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class TaskTrial:
    task: str
    number: int


@dataclass(frozen=True)
class TrialOutcome:
    """One finished trial, as stored in its file."""

    task: str
    trial: int
    success: bool
    steps: int
    seconds: float


class Agent(Protocol):
    def act(self, seen: Sequence[Observation], trials: Sequence[TaskTrial], steps: Sequence[int]) -> list[NDArray[Any]]:
        """For each observation the next actions, (C, A): all C are executed before the next observation.

        `steps`: steps taken before in each trial.
        """


class TrialFolder:
    """Finished trials under `folder`/KEY/, one JSON file each; KEY is a hash of all settings that affect outcomes."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        text = json.dumps(identity, sort_keys=True, default=str)
        self.path = folder / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "settings.json", json.dumps(identity, indent=1, default=str) + "\n")

    def read(self, trials: Sequence[TaskTrial]) -> dict[TaskTrial, TrialOutcome]:
        """The outcomes of finished `trials`."""
        found = {}
        for trial in trials:
            with suppress(FileNotFoundError):
                found[trial] = TrialOutcome(**json.loads(self._file(trial).read_text()))
        return found

    def write(self, outcome: TrialOutcome, video: Sequence[Frame]) -> None:
        """Store an outcome, with its video (none if empty) beside it."""
        path = self._file(TaskTrial(outcome.task, outcome.trial))
        path.parent.mkdir(exist_ok=True)
        if video:
            _save_video(path.with_suffix(".gif"), video)
        write_atomic(path, json.dumps(asdict(outcome)) + "\n")

    def video(self, outcome: TrialOutcome) -> Path | None:
        path = self._file(TaskTrial(outcome.task, outcome.trial)).with_suffix(".gif")
        return path if path.is_file() else None

    def _file(self, trial: TaskTrial) -> Path:
        return self.path / re.sub(r"[^\w.-]", "_", trial.task) / f"{trial.number:05d}.json"


def _save_video(path: Path, frames: Sequence[Frame], fps: float = 12) -> None:
    side = min(224, max(144, frames[0].shape[0]))
    sheets = [Image.fromarray(f).resize((side * f.shape[1] // f.shape[0], side)) for f in frames]
    pause = round(1000 / fps)
    lasts = [pause] * (len(sheets) - 1) + [1500]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=lasts, loop=0)


@dataclass(frozen=True)
class Simulation:
    """The simulators, their settings, number of processes and step limit; picklable."""

    benchmarks: SimulatorCatalogue
    benchmark: str
    setting: Setting
    processes: int
    max_steps: int | None = None  # maximum steps of a trial; the benchmark's if None


def drive(
    simulation: Simulation,
    agent: Agent | None,
    trials: Sequence[TaskTrial],
    folder: TrialFolder,
    *,
    keep_video: Callable[[TrialOutcome], bool] = lambda outcome: not outcome.success,
    done: Callable[[TrialOutcome], None] = lambda outcome: None,
) -> None:
    """Run the trials and write each into `folder`; `done` is called with each outcome.

    `agent`: None if the setting lets the benchmark's expert act. `keep_video`: whether to keep an outcome's video.

    Raises:
        DataError: A simulator cannot be started, a trial cannot begin, or an action does not fit.
    """
    waiting = sorted(trials, key=lambda trial: (trial.task, trial.number))
    with ExitStack() as stack:
        workers: dict[Connection, _Worker] = {}
        for _ in range(min(simulation.processes, len(waiting))):
            worker = _Worker(simulation)
            stack.callback(worker.close)
            workers[worker.pipe] = worker
            worker.begin(_next(waiting, [w.trial.task for w in workers.values() if w.trial], None))
        while busy := {pipe: worker for pipe, worker in workers.items() if worker.trial}:
            asking = []
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker = busy[pipe]
                message = worker.hear()
                if isinstance(message, _Finished):
                    outcome = message.outcome
                    folder.write(outcome, message.video if keep_video(outcome) else [])
                    done(outcome)
                    others = [w.trial.task for w in busy.values() if w.trial and w is not worker]
                    worker.begin(_next(waiting, others, outcome.task))
                else:
                    asking.append((worker, message))
            if asking:
                assert agent is not None, "the expert asks nobody"
                seen = [moment for _, (moment, _) in asking]
                actions = agent.act(seen, [w.trial for w, _ in asking if w.trial], [n for _, (_, n) in asking])
                for (worker, _), chunk in zip(asking, actions, strict=True):
                    worker.pipe.send(np.asarray(chunk, np.float64))


def run_missing(
    bar: Progress,
    what: str,
    simulation: Simulation,
    agent: Callable[[], Agent | None],
    trials: Sequence[TaskTrial],
    store: TrialFolder,
    keep_video: Callable[[TrialOutcome], bool],
) -> None:
    """`drive` the trials that `store` lacks; `agent` is only called if there are some."""
    there = store.read(trials)
    watched = bar.add_task(what, total=len(trials), completed=len(there))
    if missing := [trial for trial in trials if trial not in there]:
        drive(simulation, agent(), missing, store, keep_video=keep_video, done=lambda _: bar.advance(watched))


def _next(waiting: list[TaskTrial], others: Sequence[str], last: str | None) -> TaskTrial | None:
    """The next trial: of the same task, because starting a task takes seconds; else of a task that no process runs."""
    if not waiting:
        return None
    found = next((t for t in waiting if t.task == last), None) or next(
        (t for t in waiting if t.task not in others), waiting[0]
    )
    waiting.remove(found)
    return found


@dataclass(frozen=True)
class _Finished:
    outcome: TrialOutcome
    video: list[Frame]


class _Worker:
    """The parent's handle of one simulator process."""

    def __init__(self, simulation: Simulation):
        context = multiprocessing.get_context("spawn")
        self.trial: TaskTrial | None = None
        self.pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, simulation), daemon=True)
        self._process.start()
        other.close()

    def begin(self, trial: TaskTrial | None) -> None:
        self.trial = trial
        if trial is not None:
            self.pipe.send(trial)

    def hear(self) -> _Finished | tuple[Observation, int]:
        try:
            message = self.pipe.recv()
        except EOFError:
            raise DataError(f"{self.trial}: the simulator's process died (out of memory?); start again") from None
        if isinstance(message, Exception):
            raise message
        return message

    def close(self) -> None:
        self.pipe.close()  # the process exits when its pipe is closed
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, simulation: Simulation) -> None:
    """The loop of a simulator process: receives trials, sends observations and outcomes."""
    import os
    import signal
    import traceback

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the pipe
    # Redirect the simulators' output; limit Mesa's software renderer, which uses all cores in every process.
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    os.environ.setdefault("LP_NUM_THREADS", "1")
    simulator, task = None, None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            trial = pipe.recv()
            try:
                if simulator is None or task != trial.task:
                    if simulator is not None:
                        simulator.close()
                    simulator = simulation.benchmarks.open(simulation.benchmark, trial.task, simulation.setting)
                    task = trial.task
                limit, began = simulation.max_steps or simulator.max_steps, time.monotonic()
                if simulation.setting.expert:  # without a camera
                    solved, video = simulator.solve(trial.number), list[Frame]()
                    success, steps = solved is not None and solved <= limit, solved or limit
                else:
                    success, steps, video = _run(pipe, simulator, trial.number, limit)
                outcome = TrialOutcome(trial.task, trial.number, success, steps, time.monotonic() - began)
                pipe.send(_Finished(outcome, video))
            except DataError as e:
                pipe.send(DataError(f"{trial.task}: {e}" if trial.task not in str(e) else str(e)))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception:
                pipe.send(RuntimeError(f"{trial}: the simulator failed:\n{traceback.format_exc()}"))
    os._exit(0)  # skip EGL's finalisers, which fail after the pipe is closed


def _run(pipe: Connection, simulator: Simulator, number: int, max_steps: int) -> tuple[bool, int, list[Frame]]:
    """Run a trial: whether the agent succeeded, the number of steps, and the video."""
    moment = simulator.reset(number)
    film, steps, success = _Film(moment.goal), 0, False
    while not success and steps < max_steps:
        film.add(moment)
        pipe.send((moment, steps))
        for action in pipe.recv():
            success = simulator.step(action)
            steps += 1
            if success or steps == max_steps:
                break
        moment = simulator.observe()
    film.add(moment, always=True)
    return success, steps, film.frames


class _Film:
    """About VIDEO_FRAMES evenly spaced frames at most of a trial of unknown length, the goal image on their right."""

    def __init__(self, goal: Frame | None):
        self.frames: list[Frame] = []
        self._goal, self._every, self._seen = goal, 1, 0

    def add(self, moment: Observation, always: bool = False) -> None:
        if not moment.images:
            return
        frame = moment.images[0]
        if always or self._seen % self._every == 0:
            self.frames.append(frame if self._goal is None else np.concatenate([frame, self._goal], axis=1))
        self._seen += 1
        if len(self.frames) > VIDEO_FRAMES:
            self.frames, self._every = self.frames[::2], 2 * self._every
