"""Actions of any dataset in one convention.

"delta": the displacement of the end-effector from its pose at the frame: dx dy dz in m, the rotation vector in rad,
both along the axes of the robot's base, and the gripper, 1 open and 0 closed. The pose reached is
(p + d, R(r) · R(pose)), as robosuite's OSC_POSE and DROID's Cartesian controllers add them.
"absolute": the pose to reach: x y z in m, rotation vector in rad, gripper likewise.
"original": the dataset's own numbers.

Rotations are read as rotation vectors; euler_xyz: about the fixed axes x, then y, then z, as in OXE and DROID;
quaternions; rot6d: the first two rows of the matrix, as PyTorch3D and robomimic store them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.formats.rotations import read_rotations
from data_tools.formats.source import ActionSpec
from stamo_dist.errors import DataError

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

KINDS = ("delta", "absolute", "original")
#: OpenVLA's threshold: a step with less motion (in the dataset's units) counts as no motion.
NO_MOTION = 1e-4

_TEXTS = {
    "delta": "end-effector delta: dx dy dz in m, rotation vector in rad",
    "absolute": "end-effector pose to reach: x y z in m, rotation vector in rad",
}
_NEEDS_POSE = (
    "the episode has no end-effector pose, which is needed to turn {0} actions into {1} ones; give --action {2}"
)


@dataclass(frozen=True)
class Convention:
    """What an action means in the shards."""

    dim: int
    text: str
    gripper: int | None  # dimension in which 1 is open and 0 closed


def convention(spec: ActionSpec | None, kind: str) -> Convention:
    """The convention that actions of `spec` are converted to.

    Raises:
        DataError: Unknown kind, or `spec` contradicts itself.
    """
    if kind not in KINDS:
        raise DataError(f"action: {kind!r} must be one of {', '.join(KINDS)}")
    if spec is None or spec.dim == 0:
        return Convention(0, "no actions", None)
    if spec.mode != "other" and len(spec.translation) != 3:
        raise DataError(f"actions ({spec.text}) do not say which dimensions are x, y and z")
    if kind == "original":
        mapped = (spec.gripper_open, spec.gripper_closed) == (1.0, 0.0)
        return Convention(spec.dim, spec.text, spec.gripper if mapped else None)
    if spec.mode == "other":
        note = "" if spec.gripper is None else f"; gripper (dimension {spec.gripper}) mapped to 1 open 0 closed"
        return Convention(spec.dim, spec.text + note, spec.gripper)
    if spec.gripper is None:
        return Convention(6, _TEXTS[kind], None)
    return Convention(7, f"{_TEXTS[kind]}, gripper 1 open 0 closed", 6)


def map_actions(
    spec: ActionSpec, kind: str, actions: np.ndarray, kept: np.ndarray, seconds: np.ndarray, pose: np.ndarray | None
) -> np.ndarray:
    """The actions at the kept frames, each standing for all steps up to the next kept one.

    Deltas are composed (translations added, rotations multiplied); for targets and gripper commands the last one is
    taken. With "original", and for actions that are not end-effector motion, the action at the kept frame is taken.

    Args:
        spec: What `actions` are.
        kind: "delta", "absolute" or "original".
        actions: (T, A).
        kept: (K,) increasing indices, the first 0.
        seconds: (T,) from each frame to the next; turns velocities into displacements.
        pose: (T, 6).

    Returns:
        float64 (K, `convention(spec, kind).dim`).

    Raises:
        DataError: A rotation is not valid, or the pose is needed and missing.
    """
    actions = np.asarray(actions, np.float64)
    if kind == "original":
        return actions[kept]
    last = np.append(kept[1:], len(actions)) - 1
    if spec.mode == "other":
        out = actions[kept].copy()
        if spec.gripper is not None:
            out[:, spec.gripper] = _gripper(spec, actions)[kept]
        return out
    if kind == "delta":
        position, turn = _deltas(spec, actions, kept, last, seconds, pose)
    else:
        position, turn = _targets(spec, actions, kept, last, seconds, pose)
    columns = [position, turn.as_rotvec()]
    if spec.gripper is not None:
        columns.append(_gripper(spec, actions)[last, None])
    return np.concatenate(columns, axis=1)


def no_ops(spec: ActionSpec | None, actions: np.ndarray, pose: np.ndarray | None) -> np.ndarray:
    """Steps without effect, by OpenVLA's rule: no motion, and the gripper command of the last step with an effect.

    Motion is the norm of translation and rotation together in the dataset's units, below 1e-4; absolute targets count
    by their distance to the pose (m, rad). Rule: openvla/experiments/robot/libero/regenerate_libero_dataset.py.

    Returns:
        bool (T,).

    Raises:
        DataError: The actions do not say how the end-effector moves.
    """
    if spec is None or spec.mode == "other":
        raise DataError("drop_noops: needs actions that move an end-effector; leave --drop-noops out")
    actions = np.asarray(actions, np.float64)
    everything = np.arange(len(actions))
    if spec.mode == "absolute":
        position, turn = _deltas(spec, actions, everything, everything, everything, pose)
        motion = np.concatenate([position, turn.as_rotvec()], axis=1)
    elif spec.rotation_kind in ("rotvec", "euler_xyz"):
        motion = actions[:, [*spec.translation, *spec.rotation]]
    else:
        motion = np.concatenate([actions[:, list(spec.translation)], _rotation(spec, actions).as_rotvec()], axis=1)
    still = np.linalg.norm(motion, axis=1) < NO_MOTION
    if spec.gripper is None:
        return still
    dropped = np.zeros(len(actions), bool)
    command: float | None = None
    for t, value in enumerate(actions[:, spec.gripper]):
        if still[t] and (command is None or value == command):
            dropped[t] = True
        else:
            command = value
    return dropped


def _gripper(spec: ActionSpec, actions: np.ndarray) -> np.ndarray:
    """(T,), 1 open and 0 closed, linear in between."""
    return (actions[:, spec.gripper] - spec.gripper_closed) / (spec.gripper_open - spec.gripper_closed)


def _rotation(spec: ActionSpec, actions: np.ndarray) -> Rotation:
    """T rotations; none at all where the actions have no rotation."""
    from scipy.spatial.transform import Rotation

    values = actions[:, list(spec.rotation)]
    if not spec.rotation:
        return Rotation.identity(len(actions))
    try:
        return read_rotations(values, spec.rotation_kind, spec.radians)
    except ValueError as e:
        raise DataError(f"actions: no {spec.rotation_kind} rotation in dimensions {list(spec.rotation)} ({e})") from e


def _deltas(
    spec: ActionSpec, actions: np.ndarray, kept: np.ndarray, last: np.ndarray, seconds: np.ndarray, pose: Any
) -> tuple[np.ndarray, Rotation]:
    """Displacement (K, 3) and rotation (K) of each kept frame's steps."""
    from scipy.spatial.transform import Rotation

    position = actions[:, list(spec.translation)] * spec.metres
    turn = _added_angles(spec, actions, pose) if spec.euler_added else _rotation(spec, actions)
    if spec.mode == "absolute":
        if pose is None:
            raise DataError(_NEEDS_POSE.format("absolute", "delta", "absolute"))
        now = Rotation.from_rotvec(pose[kept, 3:])
        there = turn[last] * now.inv() if spec.rotation else Rotation.identity(len(kept))
        return position[last] - pose[kept, :3], there
    if spec.mode == "velocity":
        position = position * seconds[:, None]
        turn = Rotation.from_rotvec(turn.as_rotvec() * seconds[:, None])
    if len(kept) == len(actions):
        return position, turn
    total = turn[kept].as_quat()
    for step in range(1, int((last - kept).max()) + 1):
        more = kept + step <= last
        total[more] = (turn[(kept + step)[more]] * Rotation.from_quat(total[more])).as_quat()
    return np.add.reduceat(position, kept), Rotation.from_quat(total)


def _added_angles(spec: ActionSpec, actions: np.ndarray, pose: np.ndarray | None) -> Rotation:
    """T rotations from the pose to the orientation obtained by adding the actions' Euler angles to the pose's.

    Raises:
        DataError: There is no pose.
    """
    from scipy.spatial.transform import Rotation

    if pose is None:
        raise DataError(_NEEDS_POSE.format("Euler angle", "delta", "original"))
    now = Rotation.from_rotvec(pose[:, 3:])
    there = now.as_euler("xyz") + actions[:, list(spec.rotation)] * spec.radians
    return Rotation.from_euler("xyz", there) * now.inv()


def _targets(
    spec: ActionSpec, actions: np.ndarray, kept: np.ndarray, last: np.ndarray, seconds: np.ndarray, pose: Any
) -> tuple[np.ndarray, Rotation]:
    """Position (K, 3) and orientation (K) to reach by each kept frame's steps."""
    from scipy.spatial.transform import Rotation

    if spec.mode == "absolute":
        return actions[last][:, list(spec.translation)] * spec.metres, _rotation(spec, actions)[last]
    if pose is None:
        raise DataError(_NEEDS_POSE.format(spec.mode, "absolute", "delta"))
    position, turn = _deltas(spec, actions, kept, last, seconds, pose)
    return pose[kept, :3] + position, turn * Rotation.from_rotvec(pose[kept, 3:])
