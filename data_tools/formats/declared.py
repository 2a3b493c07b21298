"""What the caller declares where files do not say it: what an action's numbers mean, and which way up images lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from data_tools.formats.source import ActionSpec, Frames
from data_tools.images import decode
from stamo_dist.errors import DataError

Mode = Literal["delta", "absolute", "velocity", "other"]
Rotation = Literal["rotvec", "euler_xyz", "quat_xyzw", "quat_wxyz", "rot6d"]
Orientation = Literal["upright", "mirrored", "flipped_vertically", "rotated_180"]
#: (value when open, value when closed); "relative": +1 closes, -1 opens, 0 keeps; None: the action has none.
Gripper = tuple[float, float] | Literal["relative"] | None

ROTATION_SIZE = {"rotvec": 3, "euler_xyz": 3, "quat_xyzw": 4, "quat_wxyz": 4, "rot6d": 6}
OPEN_1 = (1.0, 0.0)
#: How an image (H, W, 3) is stored → the index that turns it upright.
TURN: dict[str, tuple[slice, ...]] = {
    "upright": (),
    "mirrored": (slice(None), slice(None, None, -1)),
    "flipped_vertically": (slice(None, None, -1),),
    "rotated_180": (slice(None, None, -1), slice(None, None, -1)),
}
_TEXT = {
    "delta": "end-effector delta",
    "absolute": "end-effector pose to reach",
    "velocity": "end-effector velocity",
    "other": "as the dataset has it",
}


def orientation_problems(orientation: str | None, option: str = "image_orientation") -> list[str]:
    """What is wrong with this value of the option."""
    if orientation is None or orientation in TURN:
        return []
    return [f"{option}: {orientation!r} must be one of {', '.join(TURN)}"]


def upright(frames: Frames, orientation: str | None) -> Frames:
    """Frames that are stored in this orientation (None: upright), turned upright; encoded ones are decoded for it."""
    turn = TURN[orientation or "upright"]
    if not turn:
        return frames

    def turned(indices: Sequence[int]) -> Iterator[np.ndarray | bytes]:
        for frame in frames(indices):
            yield (decode(frame) if isinstance(frame, bytes) else frame)[turn]

    return turned


def parse_gripper(value: str) -> Gripper:
    """The option `gripper`: "OPEN,CLOSED", "relative", or "absent".

    Raises:
        DataError: It is something else.
    """
    if value == "relative":
        return "relative"
    if value in ("absent", "none"):
        return None
    try:
        open_, closed = (float(part) for part in str(value).split(","))
    except ValueError:
        raise DataError(f"gripper: {value!r} must be OPEN,CLOSED (e.g. 1,0), relative or absent") from None
    if open_ == closed:
        raise DataError(f"gripper: {value!r}: open and closed must differ")
    return open_, closed


def declared_spec(
    name: str,
    dim: int,
    *,
    mode: Mode,
    rotation: Rotation,
    metres: float = 1.0,
    radians: float = 1.0,
    gripper: Gripper = None,
    gripper_dim: int | None = None,
) -> tuple[ActionSpec, list[str]]:
    """What an action of `dim` dimensions means: x y z, rotation, then the gripper, or the gripper at `gripper_dim`.

    Dimensions beyond these are allowed only with a `gripper_dim`; they stay in `original_action`.

    Returns:
        The spec, and why it cannot be.
    """
    has_gripper = gripper is not None
    arm = dim - has_gripper if gripper_dim is None else gripper_dim
    turning = 0 if arm == 3 else ROTATION_SIZE[rotation]
    problems = []
    if gripper_dim is not None and not (has_gripper and 0 <= gripper_dim < dim):
        problems.append(f"gripper_dim: {gripper_dim} needs gripper=OPEN,CLOSED and must be below {dim} dimensions")
    elif mode != "other" and arm != 3 + turning:
        problems.append(
            f"action: {name} has {dim} dimensions; x y z, rotation ({rotation}){', gripper' if has_gripper else ''} "
            f"would be {3 + turning + has_gripper}; give other keys, another rotation, or mode=other"
        )
    ends = OPEN_1 if gripper == "relative" else gripper
    text = f"{_TEXT[mode]}: {name}"
    if mode != "other":
        turned = f", {rotation} (1 = {radians:g} rad)" if turning else ""
        text += f", x y z (1 = {metres:g} m){turned}"
    at = None if ends is None else dim - 1 if gripper_dim is None else gripper_dim
    if ends is not None:
        place = f" (dimension {at})" if gripper_dim is not None else ""
        text += f", gripper{place} {ends[0]:g} open {ends[1]:g} closed"
        text += " (stored relative)" if gripper == "relative" else ""
    motion = mode != "other"
    spec = ActionSpec(
        dim=dim,
        text=text,
        mode=mode,
        translation=(0, 1, 2) if motion else (),
        metres=metres,
        rotation=tuple(range(3, 3 + turning)) if motion else (),
        rotation_kind=rotation,
        radians=radians,
        gripper=at,
        gripper_open=ends[0] if ends else 1.0,
        gripper_closed=ends[1] if ends else 0.0,
    )
    return spec, problems


def pose_rotvec(values: np.ndarray, rotation: Rotation) -> np.ndarray:
    """(T, ≥ 6) position in m and rotation → (T, 6) position and rotation vector in rad."""
    from scipy.spatial.transform import Rotation as Turn

    turned = values[:, 3 : 3 + ROTATION_SIZE[rotation]].astype(np.float64)
    if rotation == "euler_xyz":
        turn = Turn.from_euler("xyz", turned)
    elif rotation == "rotvec":
        turn = Turn.from_rotvec(turned)
    else:
        turn = Turn.from_quat(turned if rotation == "quat_xyzw" else turned[:, [1, 2, 3, 0]])
    return np.concatenate([values[:, :3], turn.as_rotvec()], axis=1)
