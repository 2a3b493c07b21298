"""Meta-World's simulator (PyPI `metaworld`) with the package's own scripted experts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_tools.simulators.rollout import Rollout, StateRenderer, observed, recorded, seed_of

CONTROL_HZ = 80
MAX_STEPS = 400
STEPS_AFTER_SUCCESS = 5
CAMERAS = {c: c for c in ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")}
ARM_JOINTS = 7
FINGER_JOINTS = 2


def tasks() -> list[str]:
    """Task names, e.g. "reach-v3"."""
    from metaworld.policies import ENV_POLICY_MAP

    return sorted(ENV_POLICY_MAP)


def instruction_of(task: str) -> str:
    """drawer-open-v3 → drawer open."""
    return task.rsplit("-v", 1)[0].replace("-", " ")


class MetaWorld:
    """One Meta-World task with varied goals and objects.

    Args:
        task: e.g. "drawer-open-v3".
    """

    def __init__(self, task: str):
        from metaworld.policies import ENV_POLICY_MAP

        self.task = task
        self.expert_class: Any = ENV_POLICY_MAP[task]
        self.env: Any = None
        self._renderer: StateRenderer | None = None
        instruction = instruction_of(task)
        self.attributes: dict[str, Any] = {
            "env_name": task,
            "bddl_file_name": "",
            "problem_info": json.dumps(
                {"problem_name": task, "domain_name": "metaworld", "language_instruction": instruction}
            ),
            "env_args": json.dumps(
                {"type": 2, "env_name": task, "env_kwargs": {"frame_skip": 5, "control_freq": CONTROL_HZ}}
            ),
            "rate_hz": float(CONTROL_HZ),
            "action_convention": "hand delta dx dy dz (1 = 1 cm), gripper effort (-1 opens, +1 closes), clipped to ±1",
        }

    def rollout(self, seed: int) -> Rollout:
        observation = self._fresh(seed)
        expert = self.expert_class()
        steps: list[dict[str, np.ndarray]] = []
        info: dict[str, Any] = {}
        succeeded = 0
        while succeeded <= STEPS_AFTER_SUCCESS and len(steps) < MAX_STEPS:
            action = _advice(expert, observation)
            steps.append({**self._observe(), "action": action})
            observation, _, _, _, info = self.env.step(action.astype(np.float32))
            succeeded += bool(info["success"])
        return recorded(bool(info["success"]), steps)

    def start(self, trial: int) -> None:
        """Begin trial number `trial`: goal and objects are drawn with a seed used only for trials."""
        self._observation = self._fresh(seed_of(self.task, trial))

    def act(self, action: np.ndarray) -> bool:
        """One control step; True if the benchmark's success check holds."""
        self._observation, _, _, _, info = self.env.step(np.asarray(action, np.float32))
        return bool(info["success"])

    def solve(self, trial: int) -> int | None:
        """Let the expert act from here until the success check holds; the number of steps, None if it fails."""
        expert = self.expert_class()
        return next((n for n in range(1, MAX_STEPS + 1) if self.act(_advice(expert, self._observation))), None)

    def picture(self, camera: str, size: int) -> np.ndarray:
        """The current image, upright (size, size, 3) uint8."""
        return np.asarray(self._drawn(size)(self._observe()["state"][None], [camera])[camera][0])

    def proprio(self) -> np.ndarray:
        """(8,): ee_states and gripper_states, as in the shards."""
        found = self._observe()
        return np.concatenate([found["ee_states"], found["gripper_states"]])

    def _fresh(self, seed: int) -> np.ndarray:
        """The first observation of a new environment, as some tasks keep changes to the model across resets."""
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        self.close()
        make: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{self.task}-goal-observable"]
        env = make(seed=0)
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env.seed(seed % 2**32)
        self.env = env
        observation: np.ndarray = env.reset()[0]
        return observation

    def _observe(self) -> dict[str, np.ndarray]:
        model, data = self.env.model, self.env.data
        position = np.array(self.env.get_endeff_pos())
        quat = np.array(data.body("hand").xquat)
        gripper = np.array(data.qpos[ARM_JOINTS : ARM_JOINTS + FINGER_JOINTS])
        return observed(
            model, data, position=position, quat=quat, gripper=gripper, joints=np.array(data.qpos[:ARM_JOINTS])
        )

    def render(self, rollout: Rollout, cameras: Sequence[str], size: int) -> dict[str, np.ndarray]:
        return self._drawn(size)(rollout.states, cameras)

    def _drawn(self, size: int) -> StateRenderer:
        if self._renderer is None:
            self._renderer = StateRenderer(self.env.model, self.env.data, size, after_set=self._place_goal)
        return self._renderer

    def _place_goal(self) -> None:
        # The goal marker's position is not part of MuJoCo's state.
        for name, position in self.env._target_site_config:
            self.env._set_pos_site(name, position)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self.env is not None:
            self.env.close()
            self.env = None


def _advice(expert: Any, observation: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        # The experts warn about every action beyond ±1; these are clipped here.
        warnings.simplefilter("ignore")
        return np.clip(np.asarray(expert.get_action(observation), np.float64), -1, 1)
