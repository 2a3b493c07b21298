"""ManiSkill 3's simulator (PyPI `mani-skill`) on the CPU, with scripted experts of our own."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.maniskill import CONTROL_HZ
from data_tools.simulators.maniskill_expert import EXPERTS, INSTRUCTIONS, ManiskillExpert
from data_tools.simulators.rollout import Rollout, seed_of
from stamo_dist.errors import DataError

CONTROL_MODE = "pd_ee_delta_pose"
#: The Panda with a hand camera in every task, so that all tasks have the same cameras.
ROBOT = "panda_wristcam"
CAMERAS = ("base_camera", "hand_camera")
MAX_STEPS = 150
STEPS_AFTER_SUCCESS = 2
#: Folders where `make maniskill` unpacks Mesa's Vulkan driver, of this or another checkout.
DRIVER = Path(os.environ.get("STAMO_LAVAPIPE") or Path(sys.prefix) / "share" / "lavapipe")
VULKAN_FIX = "no Vulkan driver that it can use: Mesa 24.3 or later is needed (`make maniskill`, or mesa-vulkan-drivers)"


def tasks() -> list[str]:
    """Environments that have an expert."""
    return list(EXPERTS)


def instruction_of(task: str) -> str:
    """The instruction of a task, as written into its files."""
    return INSTRUCTIONS[task]


def _find_driver() -> None:
    """Select the Vulkan driver that `make maniskill` unpacked, unless another is set; call before importing sapien.

    Its libraries are outside the linker's path, so they are loaded here and then found by name.
    """
    manifest = DRIVER / "lvp_icd.json"
    named = {os.environ.get(name, str(manifest)) for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES")}
    if not manifest.is_file() or named != {str(manifest)}:
        return
    os.environ["VK_ICD_FILENAMES"] = os.environ["VK_DRIVER_FILES"] = str(manifest)
    waiting = sorted(DRIVER.glob("lib/*"))
    for _ in range(len(waiting)):  # retried, as one library may need another
        failed = []
        for library in waiting:
            try:
                ctypes.CDLL(str(library))
            except OSError:
                failed.append(library)
        waiting = failed


class ManiSkillWorld:
    """One ManiSkill task; `pd_ee_delta_pose` moves its Panda.

    The goal of PickCube, which the package hides from its cameras, is drawn, so that policies can see it.

    Args:
        task: e.g. "PickCube-v1".
    """

    def __init__(self, task: str):
        self.task = task
        self._env: Any = None
        self._size = 128
        self._seed = 0
        self.attributes: dict[str, Any] = {
            "env_id": task,
            "env_kwargs": json.dumps(
                {"obs_mode": "rgb", "control_mode": CONTROL_MODE, "robot_uids": ROBOT, "sim_backend": "physx_cpu"}
            ),
            "rate_hz": CONTROL_HZ,
            "instruction": instruction_of(task),
        }

    def rollout(self, seed: int) -> Rollout:
        self._fresh(seed)
        actions, states, seen = [], [self._state()], [self._low()]
        succeeded, success = 0, False
        for action in islice(self._advice(seed), MAX_STEPS):
            success = self.act(action)
            actions.append(action)
            states.append(self._state())
            seen.append(self._low())
            succeeded += success
            if succeeded > STEPS_AFTER_SUCCESS:
                break
        return Rollout(
            success=success,
            actions=np.stack(actions),
            states=np.stack(states),
            robot_states=np.zeros((len(actions), 0)),
            obs={key: np.stack([low[key] for low in seen]) for key in seen[0]},
            seed=seed,
        )

    def start(self, trial: int) -> None:
        """Begin trial number `trial`, with a seed used only for trials."""
        self._fresh(seed_of(self.task, trial))

    def act(self, action: np.ndarray) -> bool:
        """One control step; True if the environment's own success check holds."""
        info = self._env.step(np.asarray(action, np.float32))[-1]
        return bool(info["success"].item())

    def solve(self, trial: int) -> int | None:
        """Let the expert act from here until the success check holds; the number of steps, None if it fails."""
        advice = islice(self._advice(seed_of(self.task, trial)), MAX_STEPS)
        return next((n for n, action in enumerate(advice, 1) if self.act(action)), None)

    def picture(self, camera: str, size: int) -> np.ndarray:
        """The current image, upright (size, size, 3) uint8."""
        self._resize(size)
        return self._draw([camera])[camera]

    def proprio(self) -> np.ndarray:
        """(16,): qpos (9) and tcp_pose (7), as in the shards."""
        return np.concatenate(list(self._low().values()))

    def render(self, rollout: Rollout, cameras: Sequence[str], size: int) -> dict[str, np.ndarray]:
        """Frames (T + 1, size, size, 3) of every camera."""
        import torch

        self._resize(size)
        frames = []
        for state in rollout.states:
            self._env.set_state(torch.from_numpy(state[None]))
            frames.append(self._draw(cameras))
        return {camera: np.stack([frame[camera] for frame in frames]) for camera in cameras}

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def _advice(self, seed: int) -> Iterator[np.ndarray]:
        for action in EXPERTS[self.task](ManiskillExpert(self._env, np.random.default_rng(seed))):
            yield np.clip(action, -1, 1).astype(np.float32).astype(np.float64)

    def _fresh(self, seed: int) -> None:
        if self._env is None:
            self._env = _make(self.task, self._size)
        self._seed = seed
        self._env.reset(seed=seed, options={"reconfigure": True})  # discard the previous episode's record
        self._env._hidden_objects.clear()

    def _resize(self, size: int) -> None:
        """Change the cameras' size and keep the simulation's state."""
        if size == self._size:
            return
        state = self._env.get_state()
        self.close()
        self._size = size
        self._fresh(self._seed)
        self._env.set_state(state)

    def _state(self) -> np.ndarray:
        """The simulation's state (S,) float32, enough to render it again."""
        return np.array(self._env.get_state()[0].cpu())

    def _low(self) -> dict[str, np.ndarray]:
        robot = self._env.agent
        return {
            "agent/qpos": np.array(robot.robot.get_qpos()[0].cpu()),
            "extra/tcp_pose": np.array(robot.tcp.pose.raw_pose[0].cpu()),
        }

    def _draw(self, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        scene = self._env.scene
        scene.update_render(update_sensors=True, update_human_render_cameras=False)
        pictures = {}
        for name in cameras:
            sensor = scene.sensors[name]
            sensor.capture()
            found = sensor.get_obs(rgb=True, depth=False, position=False, segmentation=False)
            pictures[name] = np.array(found["rgb"][0].cpu())
        return pictures


def _make(task: str, size: int) -> Any:
    """Create the unwrapped environment, which has no step limit.

    Raises:
        DataError: It cannot render on this machine.
    """
    _find_driver()
    import gymnasium
    import mani_skill.envs  # noqa: F401

    from stamo_dist.device import Device  # with it comes torch

    logging.getLogger("mani_skill").setLevel(logging.ERROR)
    try:
        return gymnasium.make(
            task,
            num_envs=1,
            obs_mode="none",
            control_mode=CONTROL_MODE,
            robot_uids=ROBOT,
            sim_backend="physx_cpu",
            render_backend="gpu" if Device.current().is_gpu else "cpu",
            sensor_configs={"width": size, "height": size},
        ).unwrapped
    except RuntimeError as e:
        raise DataError(f"ManiSkill cannot render: {VULKAN_FIX} ({e})") from e
