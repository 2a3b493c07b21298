"""Scripted experts for ManiSkill's cube tasks, driving pd_ee_delta_pose from privileged poses.

The package's own planners give joint positions and need mplib, which crashes beside numpy 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

#: pd_ee_delta_pose: 1 asks for 0.1 m, and -1 for 0.1 rad (see data_tools.formats.maniskill.action_spec).
METRES_PER_UNIT = 0.1
RADIANS_PER_UNIT = -0.1
OPEN, CLOSE = 1.0, -1.0
#: The arm lags behind its command: it covers about a third of the requested displacement per step.
GAIN = 2.0
HALF = 0.02  # half the side of every cube
GRIPPER_STEPS = 6
MAX_PHASE_STEPS = 40


class ManiskillExpert:
    """Yields actions (7,) that solve a task, reading the environment in each step; it holds still after the last phase.

    Args:
        env: The unwrapped environment, just reset.
        rng: Varies heights and speed, so that episodes differ in more than their start.
    """

    def __init__(self, env: Any, rng: np.random.Generator):
        self.env = env
        self.speed = rng.uniform(0.3, 0.6)
        self.clearance = rng.uniform(0.06, 0.11)
        self.offset = rng.uniform(-0.005, 0.005, 2)

    def pick(self) -> Iterator[np.ndarray]:
        """PickCube: carry the cube to the goal and stay there."""
        yield from self._grasp(self.env.cube)
        held = position(self.env.agent.tcp) - position(self.env.cube)
        yield from self._rest(lambda: position(self.env.goal_site) + held, CLOSE)

    def stack(self) -> Iterator[np.ndarray]:
        """StackCube: put cube A on cube B and let it go."""
        yield from self._grasp(self.env.cubeA)
        yield from self._move(position(self.env.agent.tcp) + up(self.clearance), CLOSE, 0.015)
        held = position(self.env.agent.tcp) - position(self.env.cubeA)
        place = position(self.env.cubeB) + up(2 * HALF) + held
        yield from self._move(place + up(self.clearance), CLOSE, 0.005)
        yield from self._move(place + up(0.002), CLOSE, 0.004)
        yield from self._hold(place + up(0.002), OPEN)
        yield from self._rest(lambda: place + up(0.08), OPEN)

    def push(self) -> Iterator[np.ndarray]:
        """PushCube: closed fingers push the cube forward, into the goal."""
        yield from self._shove(-1)

    def pull(self) -> Iterator[np.ndarray]:
        """PullCube: closed fingers behind the cube draw it back, into the goal."""
        yield from self._shove(1)

    def _grasp(self, cube: Any) -> Iterator[np.ndarray]:
        at = position(cube) + np.array([*self.offset, 0.0])
        self.turned = across(matrix(cube), matrix(self.env.agent.tcp))
        yield from self._move(at + up(self.clearance), OPEN, 0.02)
        yield from self._move(at, OPEN, 0.006)
        yield from self._hold(at, CLOSE)

    def _shove(self, side: int) -> Iterator[np.ndarray]:
        cube, goal = position(self.env.obj), position(self.env.goal_region)
        self.turned = across(np.eye(3), matrix(self.env.agent.tcp))
        away = np.array([side * (HALF + 0.04), self.offset[0], 0.0])
        yield from self._move(cube + away + up(self.clearance), CLOSE, 0.02)
        yield from self._move(cube + away, CLOSE, 0.01)
        aim = np.array([goal[0], cube[1] + self.offset[0], HALF]) + np.array([side * HALF, 0.0, 0.0])
        yield from self._rest(lambda: aim, CLOSE)

    def _move(self, goal: np.ndarray, gripper: float, tolerance: float) -> Iterator[np.ndarray]:
        for _ in range(MAX_PHASE_STEPS):
            if np.linalg.norm(goal - position(self.env.agent.tcp)) < tolerance:
                return
            yield self._toward(goal, gripper)

    def _hold(self, goal: np.ndarray, gripper: float) -> Iterator[np.ndarray]:
        for _ in range(GRIPPER_STEPS):
            yield self._toward(goal, gripper)

    def _rest(self, goal: Callable[[], np.ndarray], gripper: float) -> Iterator[np.ndarray]:
        while True:
            yield self._toward(goal(), gripper)

    def _toward(self, goal: np.ndarray, gripper: float) -> np.ndarray:
        """One proportional step towards a position (3,) of the fingertips and the orientation `turned`."""
        from scipy.spatial.transform import Rotation

        tcp = self.env.agent.tcp
        move = (goal - position(tcp)) / METRES_PER_UNIT * GAIN
        move *= min(1.0, self.speed / max(1e-9, np.abs(move).max()))
        turn = Rotation.from_matrix(self.turned @ matrix(tcp).T).as_rotvec() / RADIANS_PER_UNIT * GAIN
        turn *= min(1.0, 1 / max(1e-9, float(np.linalg.norm(turn))))
        return np.array([*move, *turn, gripper])


#: Environment → its expert.
EXPERTS: dict[str, Callable[[ManiskillExpert], Iterator[np.ndarray]]] = {
    "PickCube-v1": ManiskillExpert.pick,
    "PushCube-v1": ManiskillExpert.push,
    "PullCube-v1": ManiskillExpert.pull,
    "StackCube-v1": ManiskillExpert.stack,
}
#: Environment → instruction; ManiSkill has none.
INSTRUCTIONS = {
    "PickCube-v1": "pick cube",
    "PushCube-v1": "push cube",
    "PullCube-v1": "pull cube",
    "StackCube-v1": "stack cube",
}


def up(height: float) -> np.ndarray:
    return np.array([0, 0, height])


def position(thing: Any) -> np.ndarray:
    """Position (3,) in m, world frame."""
    return np.asarray(thing.pose.p[0].cpu(), np.float64)


def matrix(thing: Any) -> np.ndarray:
    """Orientation (3, 3), world frame."""
    return np.asarray(thing.pose.to_transformation_matrix()[0, :3, :3].cpu(), np.float64)


def across(object: np.ndarray, hand: np.ndarray) -> np.ndarray:
    """Orientation (3, 3) of a hand that points down and closes (along its y axis) across the object's nearest sides."""
    sides = [sign * object[:, axis] * [1, 1, 0] for axis in (0, 1) for sign in (1, -1)]
    closing = max(sides, key=lambda side: float(side @ hand[:, 1]))
    closing = closing / np.linalg.norm(closing)
    down = np.array([0.0, 0.0, -1.0])
    return np.stack([np.cross(closing, down), closing, down], axis=1)
