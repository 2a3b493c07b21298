"""Episodes from real simulators: roll out scripted experts, keep the successful ones, render them, write HDF5.

Determinism: attempt k of a task is seeded by (task, seed, k), and the file holds the first N successful attempts in
their order, whatever the number of processes and however often the run was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.convert.progress import EVERY
from data_tools.simulators.jobs import PARTS, AttemptOutcome, TaskJob, open_jobs
from data_tools.simulators.rollout import SimulatorWorld
from data_tools.simulators.tasks import (
    DEFAULT_CAMERAS,
    check_request,
    default_processes,
    open_world,
    prepare_environment,
)
from data_tools.workers import spawned
from stamo_dist.errors import DataError
from stamo_dist.words import counted


@dataclass(frozen=True)
class Simulated:
    """The result of a call of `simulate`. `files`: all tasks' files; the counts cover this call alone."""

    files: list[Path]
    attempts: int
    episodes: int
    frames: int
    seconds: float

    def __str__(self) -> str:
        if not self.attempts:
            return f"{len(self.files)} file(s) already whole"
        return (
            f"{counted(self.episodes, 'episode')} of {counted(self.attempts, 'attempt')} "
            f"({self.episodes / self.attempts:.0%} success), "
            f"{self.frames} frames in {self.seconds:.0f} s ({self.frames / self.seconds:.1f} frames/s)"
        )


@dataclass(frozen=True)
class Recording:
    """Recording settings; all attempts in a file share them.

    Attributes:
        benchmark: "libero", "metaworld" or "maniskill".
        size: Side of the square frames in pixels.
        cameras: LIBERO: agentview, eye_in_hand, …; Meta-World: corner, corner2, corner3, topview, …; ManiSkill:
            base_camera, hand_camera. The benchmark's usual ones when empty.
        seed: Base seed.
    """

    benchmark: str
    size: int = 256
    cameras: Sequence[str] = ()
    seed: int = 0


def simulate(
    asked: Recording,
    out: Path,
    *,
    tasks: Sequence[str],
    episodes: int,
    processes: int | None = None,
    quiet: bool = False,
) -> Simulated:
    """Write OUT/SUITE/TASK_demo.hdf5 with `episodes` successful episodes each.

    Meta-World: OUT/TASK_demo.hdf5; ManiSkill: OUT/TASK.h5 and OUT/TASK.json.

    Run again after a kill it continues; the files come out the same. Asked for more episodes it adds to its files.

    Args:
        asked: The simulator, cameras, size and seed.
        out: Folder to write into.
        tasks: LIBERO: "SUITE/INDEX", "SUITE/TASK_NAME" or "SUITE" for all of it. Meta-World: "reach-v3", ….
            ManiSkill: "PickCube-v1", ….
        episodes: Successful episodes per task.
        processes: Simulator processes; when omitted one per usable core, as far as memory allows.
        quiet: No progress bar.

    Raises:
        DataError: Unknown benchmark, task or camera, missing extra, OpenGL or Vulkan, an output folder that cannot be
            written or holds files made with other options, or a task the expert does not solve.
    """
    benchmark, cameras = asked.benchmark, list(asked.cameras or DEFAULT_CAMERAS.get(asked.benchmark, []))
    resolved = check_request(benchmark, tasks, cameras, episodes=episodes, size=asked.size)
    options = asdict(replace(asked, cameras=cameras))
    jobs = open_jobs(resolved, out, options, episodes)
    todo = [job for job in jobs if not job.written]
    processes = max(1, min(processes or default_processes(benchmark), sum(job.missing for job in todo)))
    start = time.monotonic()
    if todo:
        try:
            with _progress(todo, quiet) as show, _pool(processes, benchmark, out / PARTS) as pool:
                _drive(pool, todo, processes, show)
        except BrokenProcessPool as e:
            raise DataError(_last_words(out / PARTS)) from e
        _clean(out / PARTS)
    done = [outcome for job in todo for outcome in job.fresh]
    return Simulated(
        files=[job.path for job in jobs],
        attempts=len(done),
        episodes=sum(o.success for o in done),
        frames=sum(o.frames for o in done if o.success),
        seconds=time.monotonic() - start,
    )


def _drive(pool: ProcessPoolExecutor, jobs: Sequence[TaskJob], processes: int, show: Callable[[], None]) -> None:
    """Run attempts in all processes until each task has its episodes; write each file once it is complete."""
    running: dict[Future[AttemptOutcome], TaskJob] = {}
    show()
    pending = list(jobs)
    while pending:
        for job in pending:
            while len(running) < processes and (attempt := job.next_attempt()) is not None:
                job.running.add(attempt)
                running[pool.submit(_attempt, job.task, job.options, attempt, job.parts)] = job
            if job.complete:
                job.write()
        pending = [job for job in pending if not job.written]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            running.pop(future).finished(future.result())
            show()


def _clean(parts: Path) -> None:
    """Remove the logs, and the folder unless it holds another call's parts."""
    for log in parts.glob("worker-*.log"):
        log.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        parts.rmdir()


def _last_words(parts: Path) -> str:
    logs = sorted(parts.glob("worker-*.log"), key=lambda p: p.stat().st_mtime)
    tail = logs[-1].read_text(errors="replace").strip().splitlines()[-5:] if logs else []
    return "\n".join(["a simulator process died (out of memory?); its last words:", *tail])


@contextlib.contextmanager
def _pool(processes: int, benchmark: str, parts: Path) -> Iterator[ProcessPoolExecutor]:
    environment = {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment["LP_NUM_THREADS"] = "1"  # Mesa's software renderer would use every core in every process
    added = {key: value for key, value in environment.items() if key not in os.environ}
    os.environ.update(added)
    try:
        with spawned(processes, _start_worker, benchmark, parts) as pool:
            yield pool
    finally:
        for key in added:
            del os.environ[key]


def _start_worker(benchmark: str, parts: Path) -> None:
    global _benchmark
    _benchmark = benchmark
    prepare_environment()
    # The simulators print and warn; the log is shown only when a process dies.
    log = os.open(parts / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)


_benchmark: str = ""
_world: tuple[str, SimulatorWorld] | None = None


def _attempt(task: str, options: dict[str, Any], attempt: int, parts: Path) -> AttemptOutcome:
    """In a worker: roll out one attempt and, if it succeeds, render and write it."""
    from data_tools.simulators import demo_file, maniskill_file

    layout = maniskill_file if options["benchmark"] == "maniskill" else demo_file
    world = _enter(task)
    seed = int.from_bytes(hashlib.sha256(f"{task}/{options['seed']}/{attempt}".encode()).digest()[:4], "big")
    rollout = world.rollout(seed)
    if rollout.success:
        frames = world.render(rollout, options["cameras"], options["size"])
        layout.write_episode(parts / f"{attempt:05d}.hdf5", rollout, frames, attempt)
    outcome = AttemptOutcome(attempt, rollout.success, len(rollout.actions), world.attributes)
    # Written last: an attempt is complete once its report exists.
    with demo_file.whole_file(parts / f"{attempt:05d}.json") as temporary:
        temporary.write_text(json.dumps(outcome.__dict__))
    return outcome


def _enter(task: str) -> SimulatorWorld:
    """The world of `task`; a worker caches the last one, because creating it takes seconds."""
    global _world
    if _world is None or _world[0] != task:
        if _world is not None:
            _world[1].close()
            _world = None
        _world = (task, open_world(_benchmark, task))
    return _world[1]


@contextlib.contextmanager
def _progress(jobs: Sequence[TaskJob], quiet: bool) -> Iterator[Callable[[], None]]:
    """Yields show(), which updates the progress line from the jobs; in a pipe it is a line every half minute."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("simulate"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes · {task.fields[rate]} · {task.fields[fps]} frames/s · ETA"),
        TimeRemainingColumn(),
    )
    start, last = time.monotonic(), float("-inf")
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        total = sum(job.episodes for job in jobs)
        line = bar.add_task("simulate", total=total, rate="starting", fps="–")

        def show() -> None:
            nonlocal last
            fresh = [o for job in jobs for o in job.fresh]
            good = [o for o in fresh if o.success]
            completed = sum(job.episodes - job.missing for job in jobs)
            rate = f"{len(good) / len(fresh):.0%} success" if fresh else "starting"
            fps = f"{sum(o.frames for o in good) / (time.monotonic() - start):.1f}" if good else "–"
            bar.update(line, completed=completed, rate=rate, fps=fps)
            if not quiet and not console.is_terminal and time.monotonic() - last > EVERY:
                last = time.monotonic()
                print(
                    f"simulate: {completed} of {total} episodes · {rate} · {fps} frames/s", file=sys.stderr, flush=True
                )

        yield show
