"""What closed-loop measurements need of a simulator; `stamo_dist.cli` brings a `SimulatorCatalogue`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stamo_dist.errors import DataError


@dataclass(frozen=True)
class Observation:
    """What an agent is shown before it acts."""

    images: tuple[NDArray[np.uint8], ...]  # upright (S, S, 3), one of each camera asked for
    proprio: NDArray[np.float64]  # (P,), as in the shards: position, rotation vector, fingers
    instruction: str
    goal: NDArray[np.uint8] | None = None  # (S, S, 3): the first camera's picture of the solved task


@dataclass(frozen=True)
class Setting:
    """How a task is shown and driven."""

    size: int  # side of the frames
    cameras: tuple[str, ...]
    actions: str = "delta"  # what the agent's numbers are: one of ACTIONS
    goals: bool = False  # the expert solves each trial first, and its last frame is the goal
    expert: bool = False  # the expert acts, and nobody is asked
    finely: bool = False  # frames are drawn as the benchmark's own renderer does; ours is faster where it can be
    rendered: int | None = None  # side at which frames are drawn, then resized as by a conversion; `size` when None


#: delta: metres, radians and a gripper that is 1 open and 0 closed, as `stamo data convert` writes them; original: the
#: simulator's own numbers; openvla: those with the gripper 1 open and 0 closed, as OpenVLA's LIBERO checkpoints give.
ACTIONS = ("delta", "original", "openvla")


class Simulator(Protocol):
    """One task, one episode at a time."""

    max_steps: int  # after which a trial has failed

    def reset(self, trial: int) -> Observation:
        """Go to the benchmark's initial state number `trial`.

        Raises:
            DataError: The benchmark has fewer, or the expert does not solve it and a goal was asked for.
        """

    def solve(self, trial: int) -> int | None:
        """Let the scripted expert act from initial state number `trial`; the steps it took, None where it failed.

        Raises:
            DataError: There is no expert for this task.
        """

    def step(self, action: NDArray[np.float64]) -> bool:
        """Act once; True when the benchmark's success check holds."""

    def observe(self) -> Observation:
        """The present moment."""

    def close(self) -> None: ...


class SimulatorCatalogue(Protocol):
    """The simulators there are. Implementations must be picklable: every worker process gets one."""

    def checkable(self, benchmark: str) -> bool:
        """Whether `resolve` can tell what there is: not so where the simulator is not installed here."""

    def resolve(self, benchmark: str, tasks: Sequence[str], setting: Setting) -> list[str]:
        """Full names of the tasks, without starting one.

        Raises:
            DataError: Unknown benchmark, task or camera, or a simulator that is not installed (with the install line).
        """

    def open(self, benchmark: str, task: str, setting: Setting) -> Simulator:
        """Start one task; called in a worker process.

        Raises:
            DataError: It cannot be started.
        """

    def instruction(self, benchmark: str, task: str) -> str:
        """What a policy is told to do in a task, without starting it."""

    def default_processes(self, benchmark: str) -> int:
        """As many simulators as this machine's cores and memory allow."""

    def default_camera(self, benchmark: str) -> str: ...

    def trials(self, benchmark: str) -> int | None:
        """How many initial states each task has; None when any number."""


def check_trials(benchmarks: SimulatorCatalogue, benchmark: str, trials: int) -> None:
    """Raises: DataError: There are not so many initial states."""
    most = benchmarks.trials(benchmark)
    if most is not None and trials > most:
        raise DataError(f"--trials {trials}: {benchmark} has {most} initial states of each task")
