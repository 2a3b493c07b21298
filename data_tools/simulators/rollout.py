"""Shared by the simulators: the record of an episode, and rendering it later from saved simulator states.

Episodes are rolled out without a camera first. Only successful ones are rendered, so a failure costs only physics.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stamo_dist.errors import DataError

#: Advice printed with every headless-OpenGL failure.
OPENGL_FIX = (
    "install headless OpenGL (Debian/Ubuntu: `apt install libegl1 libgl1-mesa-dri`), "
    "or `apt install libosmesa6` and set MUJOCO_GL=osmesa"
)


def check_opengl() -> None:
    """Import MuJoCo, which loads OpenGL as MUJOCO_GL says.

    Raises:
        DataError: The libraries are missing.
    """
    try:
        import mujoco  # noqa: F401
    except Exception as e:
        backend = os.environ.get("MUJOCO_GL")
        raise DataError(f"no headless OpenGL (MUJOCO_GL={backend}: {type(e).__name__}: {e}); {OPENGL_FIX}") from e


@dataclass(frozen=True)
class Rollout:
    """One episode of T steps; row t of every array was taken just before `actions[t]`.

    Attributes:
        success: Whether the benchmark's own success check held at the end.
        actions: (T, A) float64, as given to the environment.
        states: (T, S) float64, MuJoCo's [time, qpos, qvel, mocap pose]: enough to render it again.
        robot_states: (T, R) float64.
        obs: LIBERO's low-dimensional observations, each (T, ·): ee_pos, ee_ori, ee_states, gripper_states,
            joint_states.
        seed: Seed of the environment's reset, if the layout stores it.

    ManiSkill's `states` and `obs` are the package's own and have T + 1 rows: the last is after the last action.
    """

    success: bool
    actions: np.ndarray
    states: np.ndarray
    robot_states: np.ndarray
    obs: Mapping[str, np.ndarray]
    seed: int | None = None


class SimulatorWorld(Protocol):
    """One task in one simulator, with its scripted expert."""

    attributes: dict[str, Any]  # written into the HDF5 file's `data` group

    def rollout(self, seed: int) -> Rollout:
        """Reset with `seed` and let the expert act; the same seed gives the same episode in any process."""

    def render(self, rollout: Rollout, cameras: Sequence[str], size: int) -> dict[str, np.ndarray]:
        """Frames (T, size, size, 3) uint8 of the last rollout, upright, by camera name."""

    def close(self) -> None:
        """Free the simulator and its OpenGL context."""


class StateRenderer:
    """Renders saved states of one MuJoCo model.

    Unless `finely`, multisampling is off and the shadow map is small: on a CPU they double the time and change little
    at 64–256 px.

    Args:
        model, data: MuJoCo's; rendering overwrites `data`.
        size: Side of the square frames in pixels.
        hidden_groups: Geometry groups that are not drawn.
        after_set: Called after each state is set, for what the state lacks (goal markers, lit burners).
        finely: Use the model's render settings, as the benchmark's own renderer does.

    Raises:
        DataError: No headless OpenGL.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        size: int,
        *,
        hidden_groups: Sequence[int] = (),
        after_set: Callable[[], None] = lambda: None,
        finely: bool = False,
    ):
        import mujoco

        if not finely:  # set before creating the context, which reads them once
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 1024
        self.model, self.data, self.size, self.after_set = model, data, size, after_set
        self._option = mujoco.MjvOption()
        for group in hidden_groups:
            self._option.geomgroup[group] = 0
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except Exception as e:
            raise DataError(f"cannot render: {type(e).__name__}: {e}; {OPENGL_FIX}") from e

    def __call__(self, states: np.ndarray, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        """Render every state of (T, S) from every camera: name → (T, size, size, 3) uint8, upright."""
        import mujoco

        frames = {c: np.empty((len(states), self.size, self.size, 3), np.uint8) for c in cameras}
        for t, state in enumerate(states):
            mujoco.mj_setState(self.model, self.data, state, _state_spec())
            mujoco.mj_forward(self.model, self.data)
            self.after_set()
            for camera in cameras:
                self._renderer.update_scene(self.data, camera=camera, scene_option=self._option)
                image = self._renderer.render()
                frames[camera][t] = image[::-1, ::-1] if self._is_rolled(camera) else image
        return frames

    def _is_rolled(self, camera: str) -> bool:
        """Whether a fixed camera is upside down, as Meta-World's corner cameras are; its frames are turned by 180°."""
        import mujoco

        index = self.model.camera(camera).id
        if self.model.cam_mode[index] != mujoco.mjtCamLight.mjCAMLIGHT_FIXED or self.model.cam_bodyid[index] != 0:
            return False
        up = self.data.cam_xmat[index].reshape(3, 3)[:, 1]
        return bool(up[2] < -0.1)

    def close(self) -> None:
        self._renderer.close()


def _state_spec() -> int:
    import mujoco

    spec = mujoco.mjtState
    return int(spec.mjSTATE_FULLPHYSICS | spec.mjSTATE_MOCAP_POS | spec.mjSTATE_MOCAP_QUAT)


def get_state(model: Any, data: Any) -> np.ndarray:
    """MuJoCo's [time, qpos, qvel, mocap pose] as one float64 vector."""
    import mujoco

    state = np.empty(mujoco.mj_stateSize(model, _state_spec()))
    mujoco.mj_getState(model, data, state, _state_spec())
    return state


def seed_of(task: str, trial: int) -> int:
    """Seed of a trial; never used by `stamo data simulate`, so it is not in training data."""
    return int.from_bytes(hashlib.sha256(f"{task}/trial/{trial}".encode()).digest()[:4], "big")


def axis_angle(quat: np.ndarray) -> np.ndarray:
    """Rotation vector (3,) of a unit quaternion (w, x, y, z), its length in [0, 2π] as robosuite's quat2axisangle.

    The length is not reduced below π: a gripper that points down is near π, where the shortest rotation would jump.
    """
    sine = float(np.linalg.norm(quat[1:]))
    if sine < 1e-8:
        return np.zeros(3)
    return np.asarray(quat[1:] * (2 * np.arctan2(sine, quat[0]) / sine))


def observed(
    model: Any, data: Any, *, position: np.ndarray, quat: np.ndarray, gripper: np.ndarray, joints: np.ndarray
) -> dict[str, np.ndarray]:
    """The recorded observations of a timestep except images; the hand's `quat` is (w, x, y, z)."""
    turn = axis_angle(quat)
    return {
        "state": get_state(model, data),
        "robot": np.concatenate([gripper, position, np.roll(quat, -1)]),
        "ee_pos": position,
        "ee_ori": turn,
        "ee_states": np.concatenate([position, turn]),
        "gripper_states": gripper,
        "joint_states": joints,
    }


def recorded(success: bool, steps: Sequence[Mapping[str, np.ndarray]]) -> Rollout:
    """The episode made of these timesteps, each as returned by `observed`, with the `action` taken."""
    rows = {key: np.stack([step[key] for step in steps]) for key in steps[0]}
    return Rollout(success, rows.pop("action"), rows.pop("state"), rows.pop("robot"), obs=rows)
