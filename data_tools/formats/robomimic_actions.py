"""The meaning of a robomimic file's actions: by the controller in its env_args, or as declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_tools.formats.checked import flag, object_at, positive, text_at
from data_tools.formats.declared import ActionOptions, Mode, declare, is_declared
from data_tools.formats.source import ActionSpec
from stamo_dist.errors import DataError

#: Normalised actions may exceed ±1 by rounding.
NORMALISED = 1.0 + 1e-3
HOW = (
    "--set action=delta --set rotation=rotvec --set metres=0.05 --set radians=0.5 --set gripper=-1,1 (gripper_dim=6 "
    "where more dimensions follow)"
)


def resolve_actions(
    asked: ActionOptions, mode: Mode | None, keys: Sequence[str], env: Mapping[str, Any], dim: int
) -> ActionSpec:
    """What an action of `dim` dimensions, made of `keys`, means: as declared, else by the file's env_args.

    Raises:
        DataError: The declaration does not fit the action.
    """
    if not is_declared(asked):
        return action_spec(env, dim, mode)
    return declare(asked, mode, " + ".join(keys) or "actions", dim)


def action_spec(env: Mapping[str, Any], dim: int, asked: str | None = None) -> ActionSpec:
    """The meaning of an action for robosuite's controller in the file's env_args; for several controllers, the arm's.

    OSC_POSE: 1 of a normalised delta is output_max (robosuite/controllers/…/osc.py); absolute poses are metres and a
    rotation vector in the world's frame, not normalised.
    """
    where = "env_args: controller_configs"
    controller = _controller(object_at(env, "env_kwargs", "env_args"))
    kind = text_at(controller, "type", where) or "unknown"
    said = controller.get("control_delta")
    delta = (
        text_at(controller, "input_type", where) in ("", "delta")
        if said is None
        else flag(said, f"{where}, control_delta")
    )
    mode = asked or ("delta" if delta else "absolute")
    turning = 3 if kind == "OSC_POSE" else 0
    pose_size = 3 + turning
    one_arm = dim in (pose_size, pose_size + 1)
    unscaled = mode != "absolute" and controller.get("output_max") is None
    if asked == "other" or kind not in ("OSC_POSE", "OSC_POSITION") or not one_arm or unscaled:
        spec = ActionSpec(dim=dim, text=f"robosuite {kind}, {dim} dimensions as stored", mode="other")
        unclear = asked is None and kind in ("OSC_POSE", "OSC_POSITION", "unknown")
        return replace(spec, unstated=f"--set action=other if they are no deltas, else e.g. {HOW}" if unclear else "")
    metres, radians = (1.0, 1.0) if mode == "absolute" else _units(controller["output_max"], turning)
    gripper = pose_size if dim > pose_size else None
    return ActionSpec(
        dim=dim,
        text=f"robosuite {kind} {mode}: x y z (1 = {metres:g} m)"
        + (f", rotation vector (1 = {radians:g} rad)" if turning else "")
        + (", gripper -1 open +1 close" if gripper else ""),
        mode="absolute" if mode == "absolute" else "delta",
        translation=(0, 1, 2),
        metres=metres,
        rotation=tuple(range(3, pose_size)),
        radians=radians,
        gripper=gripper,
        gripper_open=-1.0,
        gripper_closed=1.0,
    )


def _units(output_max: Any, turning: int) -> tuple[float, float]:
    """Metres and radians of one unit.

    Raises:
        DataError: output_max is neither a number nor a list of numbers, or differs between axes.
    """
    where = "env_args: controller_configs: output_max"
    parts = output_max if isinstance(output_max, list) else [output_max] * (3 + turning)
    try:
        scale = [positive(part, where) for part in parts if not isinstance(part, str | list)]
    except DataError:
        scale = []
    if len(scale) != len(parts) or len(scale) not in (3, 3 + turning):
        raise DataError(f"{where} {output_max!r:.60} are no {3 + turning} positive numbers")
    if len(set(scale[:3])) > 1 or len(set(scale[3:])) > 1:
        raise DataError(f"{where} {output_max!r:.60} are not the same for all axes; {HOW}")
    return scale[0], scale[-1]


def _controller(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arm's controller: robosuite's ≤ 1.4 config, or the right arm's part of a composite one (≥ 1.5).

    Raises:
        DataError: controller_configs has another form.
    """
    configs = kwargs.get("controller_configs") or {}
    if isinstance(configs, list):
        configs = configs[0] if configs else {}
    try:
        parts = configs.get("body_parts") or configs.get("body_parts_controller_configs") or {}
        arms = parts.get("arms", parts)
        return next((arms[side] for side in ("right", "left") if isinstance(arms.get(side), dict)), configs)
    except AttributeError:
        raise DataError(f"env_args: controller_configs {configs!r:.60} is no controller's config") from None


def check_range(path: Path, id: str, actions: h5py.Dataset, spec: ActionSpec) -> None:
    """Check that normalised delta actions lie within ±1.

    Raises:
        DataError: The file states normalised deltas but has larger values.
    """
    if spec.mode != "delta":
        return
    largest = float(np.abs(actions[:, list(spec.translation + spec.rotation)]).max())
    if largest > NORMALISED:
        raise DataError(
            f"{path}: actions of {id} reach {largest:.2f}, beyond the ±1 of the delta its controller takes; if they "
            "are poses to reach (as in Diffusion Policy's *_abs.hdf5) give --set action=absolute, else action=other"
        )
