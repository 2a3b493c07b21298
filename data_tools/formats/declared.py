"""Options for what files do not state: the meaning of an action's numbers, and the orientation of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from data_tools.formats.rotations import ROTATION_SIZE, Rotation
from data_tools.formats.source import ActionSpec, Frames
from data_tools.images import decode
from stamo_dist.errors import DataError

Mode = Literal["delta", "absolute", "velocity", "other"]
Orientation = Literal["upright", "mirrored", "flipped_vertically", "rotated_180"]
#: (value when open, value when closed); "relative": +1 closes, -1 opens, 0 keeps; None: the action has none.
Gripper = tuple[float, float] | Literal["relative"] | None

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


@dataclass(kw_only=True)
class ImageOptions:
    """Options of a format whose images may not be upright.

    Args:
        image_orientation: How images are stored: "upright" when omitted, "mirrored", "flipped_vertically" or
            "rotated_180".
    """

    image_orientation: Orientation | None = None


@dataclass(kw_only=True)
class ActionOptions(ImageOptions):
    """Options of a format whose actions can be declared in full, except their mode.

    Args:
        rotation: "rotvec", "euler_xyz", "quat_xyzw", "quat_wxyz" or "rot6d", after x y z.
        metres: Metres of one unit of translation; 1 when omitted.
        radians: Radians of one unit of rotation; 1 when omitted.
        gripper: "OPEN,CLOSED": the gripper dimension's value when open and when closed; "relative": +1 closes, -1
            opens, 0 keeps; or "absent".
        gripper_dim: The gripper's dimension, from 0, where others follow it; the last when omitted.
        pose_rotation: Rotation of the pose.
        rate_hz: Frames per second.
    """

    rotation: Rotation | None = None
    metres: float | None = None
    radians: float | None = None
    gripper: str | None = None
    gripper_dim: int | None = None
    pose_rotation: Rotation | None = None
    rate_hz: float | None = None


def not_one_of(choices: Iterable[str], **options: str | None) -> list[str]:
    """A problem for each given option that is not one of its choices."""
    there = tuple(choices)
    return [
        f"{name}: {value!r} must be one of {', '.join(there)}"
        for name, value in options.items()
        if value is not None and value not in there
    ]


def not_positive(**options: float | None) -> list[str]:
    """A problem for each given option that is not above 0."""
    return [f"{name}: {n} must be positive" for name, n in options.items() if n is not None and not float(n) > 0]


def orientation_problems(orientation: str | None) -> list[str]:
    """What is wrong with this value of the option image_orientation."""
    return not_one_of(TURN, image_orientation=orientation)


def upright(frames: Frames, orientation: str | None) -> Frames:
    """Turn frames stored in this orientation (None: upright) upright; encoded frames are decoded if turned."""
    turn = TURN[orientation or "upright"]
    if not turn:
        return frames

    def turned(indices: Sequence[int]) -> Iterator[np.ndarray | bytes]:
        for frame in frames(indices):
            yield (decode(frame) if isinstance(frame, bytes) else frame)[turn]

    return turned


def parse_gripper(value: str, problems: list[str]) -> Gripper:
    """The option `gripper`: "OPEN,CLOSED", "relative" or "absent"; anything else goes to `problems`."""
    if value == "relative":
        return "relative"
    if value in ("absent", "none"):
        return None
    try:
        open_, closed = (float(part) for part in str(value).split(","))
    except ValueError:
        problems.append(f"gripper: {value!r} must be OPEN,CLOSED (e.g. 1,0), relative or absent")
        return None
    if open_ == closed:
        problems.append(f"gripper: {value!r}: open and closed must differ")
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
        The spec, and the problems with it.
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


def is_declared(asked: ActionOptions) -> bool:
    """Whether any option declares the actions; then the files are not consulted."""
    return any(v is not None for v in (asked.rotation, asked.metres, asked.radians, asked.gripper, asked.gripper_dim))


def declared_problems(asked: ActionOptions, mode: Mode | None, option: str) -> list[str]:
    """Problems with the options' values alone; `option` names the option that gives the mode."""
    problems = orientation_problems(asked.image_orientation)
    problems += not_one_of(get_args(Mode), **{option: mode})
    problems += not_one_of(get_args(Rotation), rotation=asked.rotation, pose_rotation=asked.pose_rotation)
    problems += not_positive(rate_hz=asked.rate_hz, metres=asked.metres, radians=asked.radians)
    if asked.gripper is not None:
        parse_gripper(asked.gripper, problems)
    if is_declared(asked) and mode not in (None, "other"):
        needed = {"rotation": asked.rotation, "gripper": asked.gripper}
        problems += [
            f"{option}: {mode}, declared, also needs {name} (gripper: OPEN,CLOSED or absent)"
            for name, value in needed.items()
            if value is None
        ]
    return problems


def declare(asked: ActionOptions, mode: Mode | None, name: str, dim: int) -> ActionSpec:
    """The declared meaning of an action of `dim` dimensions.

    Raises:
        DataError: The declaration does not fit the dimensions.
    """
    spec, problems = declared_spec(
        name,
        dim,
        mode=mode or "other",
        rotation=asked.rotation or "rotvec",
        metres=asked.metres or 1.0,
        radians=asked.radians or 1.0,
        gripper=None if asked.gripper is None else parse_gripper(asked.gripper, []),
        gripper_dim=asked.gripper_dim,
    )
    if problems:
        raise DataError("; ".join(problems))
    return spec


def spec_notes(spec: ActionSpec | None, more: str = "") -> list[str]:
    """Notes: the actions' meaning is undeclared, or stored actions have more dimensions than `action`."""
    if spec is None:
        return []
    if spec.mode == "other":
        return [f"actions: {spec.text}{more}; to say what they are give {spec.unstated}"] if spec.unstated else []
    rest = spec.dim - 1 - max(*spec.rotation, *spec.translation, spec.gripper or 0)
    return [f"actions: the last {rest} of {spec.dim} dimensions are only in original_action"] if rest else []


def settle_gripper(asked: ActionOptions, actions: np.ndarray) -> np.ndarray:
    """The actions (T, A), with a relative gripper made absolute."""
    if asked.gripper != "relative":
        return actions
    settled = np.array(actions)
    at = actions.shape[1] - 1 if asked.gripper_dim is None else asked.gripper_dim
    settled[:, at] = absolute_gripper(actions[:, at])
    return settled


def absolute_gripper(relative: np.ndarray) -> np.ndarray:
    """(T,) commands +1 closes, -1 opens, 0 keeps → (T,) 1 open, 0 closed; before the first command, its opposite.

    OpenVLA's rule (rel2abs_gripper_actions of prismatic/vla/datasets/rlds/utils/data_utils.py).
    """
    command = np.where(relative > 0.1, 0.0, np.where(relative < -0.1, 1.0, np.nan))
    given = np.flatnonzero(~np.isnan(command))
    if not len(given):
        return np.ones(len(relative), np.float32)
    last = np.searchsorted(given, np.arange(len(command)), side="right") - 1
    absolute = np.where(last >= 0, command[given[np.maximum(last, 0)]], 1 - command[given[0]])
    return absolute.astype(np.float32)
