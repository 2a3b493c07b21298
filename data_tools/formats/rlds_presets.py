"""Conventions of known RLDS datasets, which RLDS itself does not state.

Rates are those of LeRobot's Open X-Embodiment configs; keys and grippers those of OpenVLA's transforms
(prismatic/vla/datasets/rlds/oxe/transforms.py). If the unit of a motion is not documented, it is kept unchanged
("other"), and only the gripper is converted.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_tools.formats.declared import OPEN_1, Gripper, Mode, Orientation
from data_tools.formats.rotations import Rotation


@dataclass(frozen=True)
class RldsPreset:
    """A dataset's keys (below `steps/`) and conventions.

    Attributes:
        rate_hz: Steps per second.
        action: Keys whose values, side by side, are the action; the first alternative that exists is taken.
        mode, rotation, metres, radians: As in ActionSpec, for an action x y z, rotation, gripper.
        gripper: (value when open, value when closed) of the last dimension; "relative": +1 closes, -1 opens, 0 keeps;
            None: the action has none.
        proprio: Keys of the proprioception, those that exist.
        pose: Key and rotation of the end effector's pose, for absolute actions.
        drop_first: The first step is dropped if its action is all zero.
        orientation: How the images are stored.
    """

    rate_hz: float
    action: tuple[tuple[str, ...], ...] = (("action",),)
    mode: Mode = "other"
    rotation: Rotation = "euler_xyz"
    metres: float = 1.0
    radians: float = 1.0
    gripper: Gripper = None
    proprio: tuple[str, ...] = ()
    pose: tuple[str, Rotation] | None = None
    drop_first: bool = False
    orientation: Orientation = "upright"


CLOSED_1 = (0.0, 1.0)
SIGN_CLOSES = (-1.0, 1.0)
SIGN_OPENS = (1.0, -1.0)
#: The action keys of RT-X's layout.
_SPLIT = ("action/world_vector", "action/rotation_delta")
_CLOSEDNESS = ((*_SPLIT, "action/gripper_closedness_action"),)

PRESETS = {
    # BridgeData V2: metres and roll-pitch-yaw since the last frame; every episode starts with an all-zero action.
    "bridge": RldsPreset(
        5,
        (("action",), (*_SPLIT, "action/open_gripper")),
        "delta",
        gripper=OPEN_1,
        proprio=("observation/state",),
        drop_first=True,
    ),
    # DROID: `action` differs between dataset builders, action_dict does not. The gripper is 0 open, 1 closed.
    "droid": RldsPreset(
        15,
        (("action_dict/cartesian_position", "action_dict/gripper_position"),),
        "absolute",
        gripper=CLOSED_1,
        proprio=(
            "observation/cartesian_position",
            "observation/gripper_position",
            "observation/joint_position",
        ),
        pose=("observation/cartesian_position", "euler_xyz"),
    ),
    # OpenVLA's regenerated LIBERO: OSC_POSE; its images are turned by 180°, so the scene is mirrored.
    "libero": RldsPreset(
        20,
        mode="delta",
        rotation="rotvec",
        metres=0.05,
        radians=0.5,
        gripper=SIGN_CLOSES,
        proprio=("observation/state",),
        orientation="mirrored",
    ),
    "fractal20220817_data": RldsPreset(
        3,
        _CLOSEDNESS,
        "delta",
        gripper="relative",
        proprio=("observation/base_pose_tool_reached", "observation/gripper_closed"),
    ),
    "kuka": RldsPreset(10, _CLOSEDNESS, gripper="relative"),
    "taco_play": RldsPreset(
        15, (("action/rel_actions_world",),), gripper=SIGN_OPENS, proprio=("observation/robot_obs",)
    ),
    "jaco_play": RldsPreset(
        10,
        (("action/world_vector", "action/gripper_closedness_action"),),
        gripper="relative",
        proprio=("observation/end_effector_cartesian_pos",),
    ),
    "berkeley_cable_routing": RldsPreset(10, (_SPLIT,), proprio=("observation/robot_state",)),
    "roboturk": RldsPreset(10, _CLOSEDNESS, gripper=SIGN_CLOSES),
    "nyu_door_opening_surprising_effectiveness": RldsPreset(3, _CLOSEDNESS, gripper="relative"),
    "viola": RldsPreset(
        20, _CLOSEDNESS, gripper=SIGN_CLOSES, proprio=("observation/joint_states", "observation/gripper_states")
    ),
    "berkeley_autolab_ur5": RldsPreset(5, _CLOSEDNESS, gripper="relative", proprio=("observation/robot_state",)),
    "toto": RldsPreset(30, ((*_SPLIT, "action/open_gripper"),), gripper=OPEN_1, proprio=("observation/state",)),
    "stanford_hydra_dataset_converted_externally_to_rlds": RldsPreset(
        10, gripper=CLOSED_1, proprio=("observation/state",)
    ),
    "austin_buds_dataset_converted_externally_to_rlds": RldsPreset(
        20, gripper=SIGN_CLOSES, proprio=("observation/state",)
    ),
}


#: Names in OpenVLA's modified_libero_rlds, less the suffix _no_noops.
_LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "liber_o10", "libero_90", "liber_o90")


def preset_of(name: str) -> str | None:
    """The preset of a dataset of this name (`name` in dataset_info.json), None for an unknown one."""
    if name in PRESETS:
        return name
    if name.removesuffix("_no_noops") in _LIBERO:
        return "libero"
    if name.startswith("bridge_"):
        return "bridge"
    return "droid" if name.startswith(("droid_", "r2d2_")) else None
