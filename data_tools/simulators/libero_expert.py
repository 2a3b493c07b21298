"""A scripted pick-and-place expert for LIBERO, driving OSC_POSE from privileged poses.

It handles goals that put objects on or in something: every task of libero_spatial and libero_object and similar tasks
of the other suites.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.simulators.rollout import axis_angle

#: OSC_POSE: action 1.0 asks for 5 cm or 0.5 rad in one control step (robosuite's controllers/config/osc_pose.json).
METERS_PER_UNIT = 0.05
RADIANS_PER_UNIT = 0.5
OPEN, CLOSE = -1.0, 1.0
#: The Panda's fingers open to 8 cm; wider objects are grasped by the rim.
GRASPABLE_WIDTH = 0.07
#: From the gripper's site down to the fingertips; with less above a table the fingers would press on it.
FINGERTIP = 0.012
FINGER_ROOM = 0.06  # outside a rim: an open finger stands 4 cm from it
MIN_GRIPPER_STEPS, MAX_GRIPPER_STEPS = 5, 20
MAX_PHASE_STEPS = 60
#: (position (3,), direction (3,)) → metres to the nearest other geometry.
Beside = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Grasp:
    """Fingertip target relative to the object's body: offset (3,) in world axes, and yaw from the rest pose."""

    offset: np.ndarray
    yaw: float


def corners(model: Any, data: Any, body: int) -> np.ndarray:
    """World positions (N, 3) of the corners of every collision geometry of `body` and its children."""
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
    points = []
    for geom in range(model.ngeom):
        if model.geom_group[geom] != 0 or not _descends(model, model.geom_bodyid[geom], body):
            continue
        center, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
        local = center + signs * half
        points.append(local @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(points)


def _descends(model: Any, body: int, ancestor: int) -> bool:
    while body > 0 and body != ancestor:
        body = model.body_parentid[body]
    return bool(body == ancestor)


def room(model: Any, data: Any, start: np.ndarray, direction: np.ndarray, body: int) -> float:
    """Metres from `start` (3,) along a unit vector to the nearest collision geometry not belonging to `body`."""
    import mujoco

    group, hit = np.array([1, 0, 0, 0, 0, 0], np.uint8), np.empty(1, np.int32)
    distance = mujoco.mj_ray(model, data, start, direction, group, 1, body, hit)
    return float(distance) if distance >= 0 else np.inf


def plan_grasp(points: np.ndarray, position: np.ndarray, rng: np.random.Generator, beside: Beside) -> Grasp:
    """Grasp an object given the corners (N, 3) of its geometry and its body position (3,).

    Narrow objects are grasped at the middle across their narrowest side, wide ones by the rim with one finger on each
    side of the wall, where there is room. At rest the fingers close along the world's y axis; `yaw` turns that
    axis. `beside` gives the free distance.
    """
    low, high = points.min(0), points.max(0)
    yaws = np.deg2rad(np.arange(-80, 91, 10))
    across = np.stack([-np.sin(yaws), np.cos(yaws)])  # closing axis of each yaw
    span = points[:, :2] @ across
    widths = np.ptp(span, axis=0) + 0.002 * np.abs(yaws)
    best = int(np.argmin(widths))
    if widths[best] <= GRASPABLE_WIDTH:
        z = max(high[2] - 0.03, (low[2] + high[2]) / 2 - 0.01, low[2] + FINGERTIP)
        middle = (low[:2] + high[:2]) / 2
        return Grasp(np.array([*middle, z]) - position, float(yaws[best]))
    height = high[2] - 0.015
    radius = np.ptp(points[:, 1]) / 2

    def free(towards: np.ndarray) -> float:
        place = np.array([*(position[:2] + radius * towards), height])
        return min(FINGER_ROOM, beside(place, np.array([*towards, 0.0])))

    side = rng.choice([-1.0, 1.0])
    towards, yaw = np.array([0.0, side]), 0.0
    if free(towards) < FINGER_ROOM:
        choices = [(sign * across[:, i], float(yaws[i])) for i in range(len(yaws)) for sign in (side, -side)]
        towards, yaw = max(choices, key=lambda choice: free(choice[0]) - 1e-4 * abs(choice[1]))
    return Grasp(np.array([*((radius - 0.008) * towards), height - position[2]]), yaw)


def _up(height: float) -> np.ndarray:
    return np.array([0, 0, height])


class LiberoExpert:
    """Yields OSC_POSE actions that pick the goal's objects and place them, one after the other.

    Args:
        env: LIBERO's ControlEnv, just reset.
        goals: (predicate, object, target) of each goal, as in `parsed_problem["goal_state"]`.
        rng: Varies approach heights and speed, so that episodes differ in more than their start.
    """

    def __init__(self, env: Any, goals: list[tuple[str, str, str]], rng: np.random.Generator):
        self.env, self.goals, self.rng = env, goals, rng
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.site = env.robots[0].eef_site_id
        self.fingers = env.robots[0]._ref_gripper_joint_pos_indexes
        self.rest = self._rotation()
        self.speed = rng.uniform(0.8, 1.0)

    def actions(self) -> Iterator[np.ndarray]:
        """Actions (7,): dx dy dz (world), rotation vector (world), gripper (−1 open, +1 closed).

        Ends if an object could not be picked up, or some steps after the last one was placed.
        """
        for _, name, target in self.goals:
            picked = yield from self._pick_and_place(name, target)
            if not picked:
                return
        for _ in range(MAX_GRIPPER_STEPS):
            yield self._toward(self._position() + _up(0.02), 0.0, OPEN)

    def _pick_and_place(self, name: str, target: str) -> Generator[np.ndarray, None, bool]:
        body = self.env.env.obj_body_id[name]
        start = self.data.xpos[body].copy()
        points = corners(self.model, self.data, body)
        grasp = plan_grasp(
            points, start, self.rng, lambda place, way: room(self.model, self.data, place, way, int(body))
        )
        depth = start[2] - points[:, 2].min()  # from the body's origin down to its underside
        clearance = self.rng.uniform(0.06, 0.12)

        at = start + grasp.offset
        yield from self._move(at + _up(clearance + 0.03), grasp.yaw, OPEN, tolerance=0.015)
        yield from self._move(at, grasp.yaw, OPEN, tolerance=0.006)
        yield from self._hold(at, grasp.yaw, CLOSE)

        place, top = self._target(target)
        carry = max(points[:, 2].max(), top) - points[:, 2].min() + clearance - 0.02
        lift = np.array([*at[:2], at[2] + carry])
        yield from self._move(lift, grasp.yaw, CLOSE, tolerance=0.03)
        if self.data.xpos[body][2] - start[2] < carry / 2:
            return False
        held = self._position() - self.data.xpos[body]  # the object may have slipped while it was lifted
        above = np.array([*(place[:2] + held[:2]), lift[2]])
        yield from self._move(above, grasp.yaw, CLOSE, tolerance=0.01)
        held = self._position() - self.data.xpos[body]
        release = np.array([*(place[:2] + held[:2]), place[2] + depth + held[2] + 0.01])
        yield from self._move(release, grasp.yaw, CLOSE, tolerance=0.01)
        yield from self._hold(release, grasp.yaw, OPEN)
        yield from self._move(release + _up(0.1), grasp.yaw, OPEN, tolerance=0.03)
        return True

    def _target(self, target: str) -> tuple[np.ndarray, float]:
        """Target position (3,) of the object's underside, and the height to clear on the way."""
        env = self.env.env
        if target in env.object_sites_dict:
            site = self.data.site(target)
            parent = env.object_sites_dict[target].parent_name
            top = site.xpos[2]
            if parent in env.obj_body_id:
                top = corners(self.model, self.data, env.obj_body_id[parent])[:, 2].max()
            return site.xpos.copy(), float(max(top, site.xpos[2]))
        body = env.obj_body_id[target]
        points = corners(self.model, self.data, body)
        return self.data.xpos[body].copy(), float(points[:, 2].max())

    def _move(self, goal: np.ndarray, yaw: float, gripper: float, *, tolerance: float) -> Iterator[np.ndarray]:
        for _ in range(MAX_PHASE_STEPS):
            if np.linalg.norm(goal - self._position()) < tolerance:
                return
            yield self._toward(goal, yaw, gripper)

    def _hold(self, goal: np.ndarray, yaw: float, gripper: float) -> Iterator[np.ndarray]:
        """Open or close the gripper and wait until the fingers stop."""
        opening = 0.0
        for step in range(MAX_GRIPPER_STEPS):
            before, opening = opening, float(np.ptp(self.data.qpos[self.fingers]))
            if step >= MIN_GRIPPER_STEPS and abs(opening - before) < 5e-4:
                return
            yield self._toward(goal, yaw, gripper)

    def _toward(self, goal: np.ndarray, yaw: float, gripper: float) -> np.ndarray:
        """One proportional step towards a fingertip position (3,) and a yaw about the world's z axis."""
        import mujoco

        move = (goal - self._position()) / METERS_PER_UNIT * 0.9
        move *= min(1.0, self.speed / max(1e-9, np.abs(move).max()))
        cos, sin = np.cos(yaw), np.sin(yaw)
        wanted = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ self.rest
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, (wanted @ self._rotation().T).ravel())
        turn = np.clip(axis_angle(quat * np.copysign(1, quat[0])) / RADIANS_PER_UNIT, -1, 1)
        return np.array([*move, *turn, gripper])

    def _position(self) -> np.ndarray:
        return np.array(self.data.site_xpos[self.site])

    def _rotation(self) -> np.ndarray:
        return np.array(self.data.site_xmat[self.site]).reshape(3, 3)
