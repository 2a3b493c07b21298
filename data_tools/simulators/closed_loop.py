"""Simulators driven step by step by an external agent."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from data_tools.formats.libero import HAND_DELTA, OSC_POSE
from data_tools.formats.maniskill import action_spec
from data_tools.formats.source import ActionSpec
from data_tools.images import resized
from data_tools.simulators.tasks import instruction_of, open_world
from stamo_dist.errors import DataError
from stamo_dist.evaluate.simulators import Observation, Setting, Simulator

#: Maximum steps of a trial: LIBERO's as in OpenVLA's evaluation (experiments/robot/libero/run_libero_eval.py), a
#: little more than the longest demonstration of each suite; Meta-World's as in its environments.
LIBERO_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
OTHER_LIBERO_STEPS = 520
METAWORLD_STEPS = 500
#: ManiSkill's: over twice the expert's longest of 20 episodes (41, 28, 31 and 72 steps), rounded up.
MANISKILL_STEPS = {"PickCube-v1": 100, "PushCube-v1": 100, "PullCube-v1": 100, "StackCube-v1": 200}


class Driven(Protocol):
    """A simulator world of this package that an agent can drive."""

    def start(self, trial: int) -> None: ...

    def act(self, action: np.ndarray) -> bool: ...

    def solve(self, trial: int) -> int | None: ...

    def picture(self, camera: str, size: int) -> np.ndarray: ...

    def proprio(self) -> np.ndarray: ...

    def close(self) -> None: ...


class ClosedLoop:
    """One task of a benchmark; a `stamo_dist.evaluate.simulators.Simulator`."""

    def __init__(self, world: Driven, spec: ActionSpec, setting: Setting, instruction: str, max_steps: int):
        self._world, self._spec, self._setting = world, spec, setting
        self._instruction, self.max_steps = instruction, max_steps
        self._goal: np.ndarray | None = None

    def reset(self, trial: int) -> Observation:
        if self._setting.goals:
            self._world.start(trial)
            if self._world.solve(trial) is None:
                raise DataError(f"the scripted expert does not solve trial {trial}, so there is no picture of its goal")
            self._goal = self._picture(self._setting.cameras[0])
        self._world.start(trial)
        return self.observe()

    def solve(self, trial: int) -> int | None:
        self._world.start(trial)
        return self._world.solve(trial)

    def step(self, action: np.ndarray) -> bool:
        return self._world.act(to_native(self._spec, action, self._setting.actions))

    def observe(self) -> Observation:
        images = tuple(self._picture(camera) for camera in self._setting.cameras)
        return Observation(images, self._world.proprio(), self._instruction, self._goal)

    def _picture(self, camera: str) -> np.ndarray:
        setting = self._setting
        drawn = self._world.picture(camera, setting.rendered or setting.size)
        return resized(drawn, setting.size)

    def close(self) -> None:
        self._world.close()


def to_native(spec: ActionSpec, action: np.ndarray, convention: str) -> np.ndarray:
    """One action (A,) in the simulator's numbers, within ±1; the inverse of `data_tools.convert.actions` for one step.

    Raises:
        DataError: It has another number of dimensions.
    """
    action = np.asarray(action, np.float64)
    expected = 7 if convention == "delta" else spec.dim
    if action.shape != (expected,):
        raise DataError(f"an action has {len(action)} numbers, {expected} in the convention {convention!r}")
    assert spec.gripper is not None
    if convention == "delta":
        native = np.zeros(spec.dim)
        native[list(spec.translation)] = action[:3] / spec.metres
        if spec.rotation:
            native[list(spec.rotation)] = action[3:6] / spec.radians
    else:
        native = action.copy()
    if convention != "original":
        opened = action[-1]
        native[spec.gripper] = spec.gripper_closed + opened * (spec.gripper_open - spec.gripper_closed)
    return np.clip(native, -1, 1)


def open_task(benchmark: str, task: str, setting: Setting) -> Simulator:
    """Start one task of a benchmark.

    Raises:
        DataError: No headless OpenGL or Vulkan, no such task, or the expert fails although a goal image is requested.
    """
    aid = {"expert": setting.goals or setting.expert, "finely": setting.finely} if benchmark == "libero" else {}
    world, told = open_world(benchmark, task, **aid), instruction_of(benchmark, task)
    if benchmark == "libero":
        suite = task.partition("/")[0]
        return ClosedLoop(world, OSC_POSE, setting, told, LIBERO_STEPS.get(suite, OTHER_LIBERO_STEPS))
    if benchmark == "maniskill":
        from data_tools.simulators.maniskill import CONTROL_MODE, ROBOT

        return ClosedLoop(world, action_spec(CONTROL_MODE, ROBOT, 7, 3), setting, told, MANISKILL_STEPS[task])
    return ClosedLoop(world, HAND_DELTA, setting, told, METAWORLD_STEPS)
