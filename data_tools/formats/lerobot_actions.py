"""The meaning of a LeRobotDataset's actions, which its files do not state: a known convention, or declared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from data_tools.formats.declared import (
    Gripper,
    Mode,
    Orientation,
    declared_spec,
    not_one_of,
    orientation_problems,
    parse_gripper,
)
from data_tools.formats.lerobot_vectors import FeatureSlice
from data_tools.formats.libero import OSC_POSE
from data_tools.formats.rotations import Rotation
from data_tools.formats.source import ActionSpec

#: Known action conventions by `action_kind`.
ACTIONS = {
    "libero": OSC_POSE,
    "bridge": ActionSpec(
        dim=7,
        text="end-effector delta: dx dy dz (m), droll dpitch dyaw (rad), gripper 1 open 0 close",
        mode="delta",
        translation=(0, 1, 2),
        rotation=(3, 4, 5),
        rotation_kind="euler_xyz",
        gripper=6,
    ),
}
#: Cameras of LIBERO as published by openpi and Hugging Face: images turned by 180°, so the scene is mirrored.
TURNED = {"image", "wrist_image", "image2"}
#: Dimensions with such names are joint or position targets; when steps are merged, the last target is taken.
_TARGETS = re.compile(r"joint|motor|shoulder|elbow|waist|wrist|\.pos$|_pos$|position|absolute|angle", re.IGNORECASE)


@dataclass(kw_only=True)
class LerobotActionOptions:
    """Options for the meaning of actions and the orientation of images.

    Args:
        action_kind: What `action` means: "libero" (OSC_POSE deltas), "bridge" (deltas in m and rad, gripper 1 open), or
            "other" (joints, or anything else): kept as stored. Or say it in full with `mode`.
        image_orientation: How images are stored: "upright", "mirrored", "flipped_vertically" or "rotated_180". Omitted:
            upright, but for action_kind "libero" with openpi's or Hugging Face's cameras (image, wrist_image).
        gripper: With `mode`: "OPEN,CLOSED", the last number's value when open and when closed; "relative": +1 closes,
            -1 opens, 0 keeps; or "absent". With action_kind "other": which number is the gripper's, from 0.
        gripper_open: With a number as `gripper`: its value when open.
        gripper_closed: With a number as `gripper`: its value when closed.
        mode: "delta", "absolute", "velocity" or "other" (kept as it is but for the gripper), of an action x y z,
            rotation, gripper; needs `rotation` and `gripper`.
        rotation: "euler_xyz", "rotvec", "quat_xyzw", "quat_wxyz" or "rot6d".
        metres: Metres of one unit of translation.
        radians: Radians of one unit of rotation.
        pose_rotation: Rotation of the pose; as `rotation` when omitted.
    """

    action_kind: Literal["other", "libero", "bridge"] | None = None
    image_orientation: Orientation | None = None
    gripper: int | str | None = None
    gripper_open: float = 1.0
    gripper_closed: float = 0.0
    mode: Mode | None = None
    rotation: Rotation | None = None
    metres: float = 1.0
    radians: float = 1.0
    pose_rotation: Rotation | None = None


def action_spec(asked: LerobotActionOptions, parts: Sequence[FeatureSlice], problems: list[str]) -> ActionSpec | None:
    """The action's meaning; contradictions are added to `problems`."""
    dim = sum(p.end - p.start for p in parts)
    unknown = not_one_of(get_args(Mode), mode=asked.mode)
    unknown += not_one_of(get_args(Rotation), rotation=asked.rotation, pose_rotation=asked.pose_rotation)
    if unknown:
        problems += unknown
        return None
    problems += not_one_of(("other", *ACTIONS), action_kind=asked.action_kind)
    known = ACTIONS.get(asked.action_kind or "")
    if asked.mode and known:
        problems.append(f"mode: {asked.mode} contradicts action_kind {asked.action_kind}; give one of them")
    number = isinstance(asked.gripper, int)
    if number and (known or not 0 <= int(asked.gripper or 0) < dim or asked.mode not in (None, "other")):
        problems.append(
            f"gripper: {asked.gripper} must be below {dim}, and only with action_kind other; with mode, OPEN,CLOSED"
        )
    if not dim:
        return None
    names = [p.feature.name for p in parts]
    if known:
        if known.dim != dim:
            problems.append(
                f"action_kind: {asked.action_kind} has {known.dim} numbers, but {' + '.join(names)} has {dim}"
            )
        return known
    if asked.mode or (asked.gripper is not None and not number):
        return _declared(asked, names, dim, problems)
    labels = [name for part in parts for name in part.names]
    spec = ActionSpec(
        dim=dim,
        text=f"{' + '.join(names)} as stored: {', '.join(labels) or f'{dim} numbers'}",
        mode="other",
        gripper=int(asked.gripper) if asked.gripper is not None else None,
        gripper_open=asked.gripper_open,
        gripper_closed=asked.gripper_closed,
    )
    if asked.action_kind is None and not any(_TARGETS.search(name) for name in (*labels, *names)):
        example = "--set mode=delta --set rotation=rotvec --set gripper=1,0"
        what = f"--set action_kind=other if they are joints or targets, else what they are, e.g. {example}"
        spec = replace(spec, unstated=what)
    return spec


def _declared(asked: LerobotActionOptions, names: Sequence[str], dim: int, problems: list[str]) -> ActionSpec | None:
    mode = asked.mode or "other"
    needed = () if mode == "other" else ("rotation", "gripper")
    if missing := [option for option in needed if getattr(asked, option) is None]:
        problems.append(f"mode: {mode} also needs {', '.join(missing)} (gripper: OPEN,CLOSED or absent)")
        return None
    if mode in ("absolute", "velocity", "delta") and (asked.metres <= 0 or asked.radians <= 0):
        problems.append(f"metres, radians: {asked.metres:g} and {asked.radians:g} must be positive")
    ends: Gripper = None
    if isinstance(asked.gripper, int):
        ends = (asked.gripper_open, asked.gripper_closed)
    elif asked.gripper is not None:
        ends = parse_gripper(asked.gripper, problems)
    spec, unclear = declared_spec(
        " + ".join(names),
        dim,
        mode=mode,
        rotation=asked.rotation or "euler_xyz",
        metres=asked.metres,
        radians=asked.radians,
        gripper=ends,
    )
    problems += unclear
    return replace(spec, gripper=asked.gripper) if isinstance(asked.gripper, int) else spec


def orientation(
    asked: LerobotActionOptions, cameras: Sequence[str], notes: list[str], problems: list[str]
) -> Orientation:
    """Orientation of stored images: the option, else that known of a publisher's LIBERO, which `notes` reports."""
    if asked.image_orientation is not None:
        problems += orientation_problems(asked.image_orientation)
        return asked.image_orientation
    if asked.action_kind != "libero":
        return "upright"
    if set(cameras) <= TURNED:
        notes.append(
            "images: mirrored back, as openpi's and Hugging Face's LIBERO (image, wrist_image) are turned by 180°; if "
            "these are upright, give --set image_orientation=upright"
        )
        return "mirrored"
    notes.append(
        f"images: taken as upright, as {', '.join(cameras)} are not the cameras of openpi's or Hugging Face's turned "
        "LIBERO; if these are turned, give --set image_orientation=mirrored"
    )
    return "upright"
