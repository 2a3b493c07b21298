"""Reading the rotation formats of datasets: rotation vectors and Euler angles about the fixed axes x, y, z in rad,
quaternions; rot6d: the first two rows of the matrix, as PyTorch3D and robomimic store them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation as Turns

Rotation = Literal["rotvec", "euler_xyz", "quat_xyzw", "quat_wxyz", "rot6d"]
#: Number of values of each format.
ROTATION_SIZE = {"rotvec": 3, "euler_xyz": 3, "quat_xyzw": 4, "quat_wxyz": 4, "rot6d": 6}


def read_rotations(values: np.ndarray, kind: Rotation, radians: float = 1.0) -> Turns:
    """T rotations from (T, ROTATION_SIZE[kind]) numbers; `radians` is one unit of rotvec and euler_xyz.

    Raises:
        ValueError: The numbers are not valid rotations.
    """
    from scipy.spatial.transform import Rotation as Turns

    if kind == "rotvec":
        return Turns.from_rotvec(values * radians)
    if kind == "euler_xyz":
        return Turns.from_euler("xyz", values * radians)
    if kind == "quat_xyzw":
        return Turns.from_quat(values)
    if kind == "quat_wxyz":
        return Turns.from_quat(values[:, [1, 2, 3, 0]])
    return Turns.from_matrix(_matrices(values))


def pose_vectors(values: np.ndarray, rotation: Rotation) -> np.ndarray:
    """(T, ≥ 6) position in m and rotation, then anything else → (T, 6) position and rotation vector in rad.

    Raises:
        ValueError: The numbers are not valid rotations.
    """
    turned = values[:, 3 : 3 + ROTATION_SIZE[rotation]].astype(np.float64)
    return np.concatenate([values[:, :3], read_rotations(turned, rotation).as_rotvec()], axis=1)


def _matrices(rot6d: np.ndarray) -> np.ndarray:
    """(T, 3, 3) from the first two rows, by Gram-Schmidt; Zhou et al. 2019, https://arxiv.org/abs/1812.07035."""
    a, b = rot6d[:, :3], rot6d[:, 3:]
    lengths = np.linalg.norm(a, axis=1, keepdims=True)
    first = a / np.where(lengths > 0, lengths, np.nan)
    rest = b - (first * b).sum(axis=1, keepdims=True) * first
    lengths = np.linalg.norm(rest, axis=1, keepdims=True)
    second = rest / np.where(lengths > 0, lengths, np.nan)
    if not np.isfinite(second).all():
        raise ValueError("rows of length 0 or parallel ones")
    return np.stack([first, second, np.cross(first, second)], axis=1)
