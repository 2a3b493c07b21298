"""One action convention for all datasets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_tools.convert.actions import convention, map_actions, no_ops
from data_tools.formats.source import ActionSpec
from stamo_dist.errors import DataError

T = 12
ALL = np.arange(T)
OSC = ActionSpec(
    7, "OSC", "delta", translation=(0, 1, 2), metres=0.05, rotation=(3, 4, 5), radians=0.5, gripper=6,
    gripper_open=-1, gripper_closed=1,
)  # fmt: skip


def some_deltas(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(-1, 1, (T, 7))
    values[:, 6] = np.where(np.arange(T) < 5, -1, 1)
    return values


def follow(pose: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """The poses after each delta, by the formula of data_tools/convert/actions.py."""
    poses = []
    for delta in deltas:
        turned = Rotation.from_rotvec(delta[3:6]) * Rotation.from_rotvec(pose[3:])
        pose = np.concatenate([pose[:3] + delta[:3], turned.as_rotvec()])
        poses.append(pose)
    return np.array(poses)


def run(spec: ActionSpec, kind: str, actions: np.ndarray, kept: np.ndarray = ALL, pose: np.ndarray | None = None):
    return map_actions(spec, kind, actions, kept, np.full(len(actions), 0.1), pose)


def test_units_and_gripper() -> None:
    out = run(OSC, "delta", some_deltas())
    np.testing.assert_allclose(out[:, :3], some_deltas()[:, :3] * 0.05)
    np.testing.assert_allclose(out[:, 3:6], some_deltas()[:, 3:6] * 0.5)
    np.testing.assert_array_equal(out[:, 6], [1] * 5 + [0] * 7)
    assert convention(OSC, "delta").gripper == 6
    assert convention(OSC, "delta").dim == 7


def test_composed_deltas_end_where_the_single_ones_do() -> None:
    """Large turns, in 3-D, at an uneven stride."""
    kept = np.array([0, 1, 4, 6, 11])
    start = np.array([0.3, 0, 0.5, 0.1, -2, 0.4])
    single, composed = run(OSC, "delta", some_deltas()), run(OSC, "delta", some_deltas(), kept)
    ends = follow(start, single)[[0, 3, 5, 10, 11]]
    np.testing.assert_allclose(follow(start, composed), ends, atol=1e-12)
    np.testing.assert_array_equal(composed[:, 6], [1, 1, 0, 0, 0])


def test_absolute_and_delta_are_each_others_inverse() -> None:
    deltas = run(OSC, "delta", some_deltas())
    start = np.array([0.3, 0, 0.5, 0.1, -2, 0.4])
    targets = follow(start, deltas)
    poses = np.vstack([start, targets[:-1]])
    np.testing.assert_allclose(run(OSC, "absolute", some_deltas(), pose=poses)[:, :6], targets, atol=1e-12)
    absolute = ActionSpec(
        7, "pose", "absolute", translation=(0, 1, 2), rotation=(3, 4, 5), gripper=6
    )  # fmt: skip
    given = np.hstack([targets, deltas[:, 6:]])
    np.testing.assert_allclose(run(absolute, "delta", given, pose=poses), deltas, atol=1e-12)
    kept = np.array([0, 5, 10])
    np.testing.assert_allclose(run(absolute, "absolute", given, kept)[:, :6], targets[[4, 9, 11]], atol=1e-12)
    with pytest.raises(DataError, match="no end-effector pose"):
        run(absolute, "delta", given)


def test_every_rotation_kind_gives_the_same_rotation() -> None:
    turns = Rotation.from_rotvec(np.random.default_rng(1).uniform(-1.5, 1.5, (T, 3)))
    quaternions = turns.as_quat()
    kinds = {
        "rotvec": turns.as_rotvec(),
        "euler_xyz": turns.as_euler("xyz"),
        "quat_xyzw": quaternions,
        "quat_wxyz": quaternions[:, [3, 0, 1, 2]],
        "rot6d": turns.as_matrix()[:, :2].reshape(T, 6) * 1.5,
    }
    for kind, values in kinds.items():
        size = values.shape[1]
        spec = ActionSpec(
            3 + size, kind, "delta", translation=(0, 1, 2), rotation=tuple(range(3, 3 + size)), rotation_kind=kind
        )  # type: ignore[arg-type]  # fmt: skip
        out = run(spec, "delta", np.hstack([np.zeros((T, 3)), values]))
        np.testing.assert_allclose(out[:, 3:], turns.as_rotvec(), atol=1e-9, err_msg=kind)


def test_euler_angles_turn_about_fixed_axes() -> None:
    """Roll by 90°, then yaw by 90° about the base's z: the hand's y axis points up, and stays so."""
    spec = ActionSpec(6, "", "delta", translation=(0, 1, 2), rotation=(3, 4, 5), rotation_kind="euler_xyz")
    out = run(spec, "delta", np.array([[0, 0, 0, np.pi / 2, 0, np.pi / 2]]), np.array([0]))
    np.testing.assert_allclose(Rotation.from_rotvec(out[0, 3:]).apply([0, 1, 0]), [0, 0, 1], atol=1e-12)


def test_a_velocity_counts_for_the_time_until_the_next_frame() -> None:
    spec = ActionSpec(6, "", "velocity", translation=(0, 1, 2), rotation=(3, 4, 5))
    actions = np.tile([1.0, 0, 0, 0, 0, 2.0], (3, 1))
    out = map_actions(spec, "delta", actions, np.array([0, 2]), np.array([0.1, 0.3, 0.2]), None)
    np.testing.assert_allclose(out[:, [0, 5]], [[0.4, 0.8], [0.2, 0.4]])


def test_other_numbers_stay_but_for_the_gripper() -> None:
    joints = ActionSpec(3, "joints", "other", gripper=2, gripper_open=0.04, gripper_closed=0.0)
    actions = np.array([[1.0, 2, 0.04], [3, 4, 0.0], [5, 6, 0.02]])
    np.testing.assert_allclose(run(joints, "delta", actions, np.array([0, 2])), [[1, 2, 1], [5, 6, 0.5]])
    np.testing.assert_allclose(run(joints, "original", actions, np.array([0, 2])), actions[[0, 2]])
    assert convention(joints, "delta").gripper == 2
    assert convention(joints, "original").gripper is None


def test_a_robot_that_does_not_turn_its_hand_has_the_same_convention() -> None:
    flat = ActionSpec(4, "xyz", "delta", translation=(0, 1, 2), metres=0.01, gripper=3)
    assert convention(flat, "delta") == convention(OSC, "delta")
    np.testing.assert_allclose(run(flat, "delta", np.ones((T, 4)))[0], [0.01, 0.01, 0.01, 0, 0, 0, 1])


def test_no_ops_by_openvlas_rule() -> None:
    """Only steps without motion and with the gripper command of the last kept step."""
    actions = np.zeros((8, 7))
    actions[:, 6] = [-1, -1, -1, 1, 1, -1, -1, -1]
    actions[1, 4] = 0.5
    actions[6, 0] = 9e-5
    np.testing.assert_array_equal(no_ops(OSC, actions, None), [1, 0, 1, 0, 1, 0, 1, 1])
    with pytest.raises(DataError, match="--drop-noops"):
        no_ops(ActionSpec(7, "joints", "other"), actions, None)


def test_broken_rotations_are_an_error() -> None:
    for kind, size in (("quat_xyzw", 4), ("rot6d", 6)):
        spec = ActionSpec(9, "", "delta", translation=(0, 1, 2), rotation=tuple(range(3, 3 + size)))
        with pytest.raises(DataError, match=f"no {kind} rotation"):
            run(replace(spec, rotation_kind=kind), "delta", np.zeros((T, 9)))  # type: ignore[arg-type]
