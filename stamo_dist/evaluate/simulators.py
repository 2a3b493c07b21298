"""The simulator interface of closed-loop measurements; `stamo_dist.cli` provides a `SimulatorCatalogue`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stamo_dist.errors import DataError


@dataclass(frozen=True)
class Observation:
    """What an agent observes before it acts."""

    images: tuple[NDArray[np.uint8], ...]  # upright (S, S, 3), one of each camera asked for
    proprio: NDArray[np.float64]  # (P,), as in the shards: position, rotation vector, fingers
    instruction: str
    goal: NDArray[np.uint8] | None = None  # (S, S, 3): the first camera's picture of the solved task


@dataclass(frozen=True)
class Setting:
    """How a task is rendered and controlled."""

    size: int  # side of the frames
    cameras: tuple[str, ...]
    actions: str = "delta"  # format of the agent's actions: one of ACTIONS
    goals: bool = False  # the expert solves each trial first, and its last frame is the goal
    expert: bool = False  # the expert acts instead of an agent
    finely: bool = False  # render like the benchmark's own renderer; ours is faster
    rendered: int | None = None  # side at which frames are rendered, then resized as in a conversion; `size` if None


#: delta: metres, radians and gripper 1 open, 0 closed, as `stamo data convert` writes them; original: the simulator's
#: own numbers; openvla: those with gripper 1 open, 0 closed, as OpenVLA's LIBERO checkpoints output.
ACTIONS = ("delta", "original", "openvla")


class Simulator(Protocol):
    """One task, one episode at a time."""

    max_steps: int  # steps after which a trial has failed

    def reset(self, trial: int) -> Observation:
        """Set the benchmark's initial state number `trial`.

        Raises:
            DataError: The benchmark has fewer, or a goal was requested and the expert does not solve it.
        """

    def solve(self, trial: int) -> int | None:
        """Let the scripted expert act from initial state number `trial`; the number of steps, None if it failed.

        Raises:
            DataError: There is no expert for this task.
        """

    def step(self, action: NDArray[np.float64]) -> bool:
        """Execute an action; True if the benchmark's success check holds."""

    def observe(self) -> Observation:
        """The current observation."""

    def close(self) -> None: ...


class SimulatorCatalogue(Protocol):
    """The available simulators. Implementations must be picklable: every worker process gets a copy."""

    def checkable(self, benchmark: str) -> bool:
        """Whether `resolve` works here: False if the simulator is not installed."""

    def resolve(self, benchmark: str, tasks: Sequence[str], setting: Setting) -> list[str]:
        """Full names of the tasks, without starting any.

        Raises:
            DataError: Unknown benchmark, task or camera, or a simulator that is not installed (with the install line).
        """

    def open(self, benchmark: str, task: str, setting: Setting) -> Simulator:
        """Start one task; called in a worker process.

        Raises:
            DataError: It cannot be started.
        """

    def instruction(self, benchmark: str, task: str) -> str:
        """The instruction of a task, without starting it."""

    def default_processes(self, benchmark: str) -> int:
        """Number of simulators that this machine's cores and memory allow."""

    def default_camera(self, benchmark: str) -> str: ...

    def trials(self, benchmark: str) -> int | None:
        """Number of initial states of each task; None if unlimited."""


def check_trials(benchmarks: SimulatorCatalogue, benchmark: str, trials: int) -> None:
    """Raises: DataError: There are fewer initial states."""
    most = benchmarks.trials(benchmark)
    if most is not None and trials > most:
        raise DataError(f"--trials {trials}: {benchmark} has {most} initial states of each task")
