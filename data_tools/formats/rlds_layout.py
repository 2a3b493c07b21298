"""Keys and conventions of an RLDS dataset, from its preset, the given options and features.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from data_tools.formats import tfds
from data_tools.formats.declared import (
    Mode,
    Orientation,
    declared_spec,
    not_one_of,
    orientation_problems,
    parse_gripper,
)
from data_tools.formats.remarks import language_keys, no_proprio
from data_tools.formats.rlds_presets import PRESETS, RldsPreset, preset_of
from data_tools.formats.rotations import ROTATION_SIZE, Rotation
from data_tools.formats.source import ActionSpec
from stamo_dist.errors import DataError


@dataclass
class RldsOptions:
    """Keys and conventions of a dataset, and which episodes are taken.

    Args:
        src: Folder with dataset_info.json, or one above it.
        preset: The known dataset whose conventions apply; by the name in dataset_info.json when omitted.
        cameras: Image keys below `observation/`; all when omitted.
        action: Keys whose values, side by side, are the action: x y z, rotation, gripper; "none" for
            none.
        proprio: Keys of the proprioception; "none" for none.
        pose: Key whose first dimensions are the end effector's position and rotation, for absolute actions;
            "none" for none.
        pose_rotation: Rotation of the pose; as `rotation` when omitted.
        instruction: Keys of the instruction, of each step or `episode_metadata/KEY` of the episode; the first that is
            not empty is taken. Those with a usual name when omitted; "none" for none.
        rate_hz: Steps per second.
        mode: "delta", "absolute", "velocity" or "other" (kept as it is but for the gripper).
        rotation: "euler_xyz", "rotvec", "quat_xyzw", "quat_wxyz" or "rot6d".
        metres: Metres of one unit of translation.
        radians: Radians of one unit of rotation.
        gripper: "OPEN,CLOSED": the last dimension's value when open and when closed; "relative": +1 closes, -1 opens,
            0 keeps, made absolute (1 open); "absent".
        image_orientation: How images are stored: "upright", "mirrored", "flipped_vertically" or "rotated_180".
        drop_first: Drop the first step if its action does not move (below 1e-5 in all dimensions but the gripper).
        only_successful: Leave out episodes whose metadata say `success` false.
    """

    src: Path
    preset: str | None = None
    cameras: Sequence[str] | None = None
    action: Sequence[str] = ()  # default () instead of None, so that "none" is a value; likewise below
    proprio: Sequence[str] = ()
    pose: str = ""
    pose_rotation: Rotation | None = None
    instruction: Sequence[str] = ()
    rate_hz: float | None = None
    mode: Mode | None = None
    rotation: Rotation | None = None
    metres: float | None = None
    radians: float | None = None
    gripper: str | None = None
    image_orientation: Orientation | None = None
    drop_first: bool | None = None
    only_successful: bool = False


@dataclass(frozen=True)
class RldsLayout:
    """The keys and conventions of a dataset; keys are relative to `steps/`, except `instruction`: full names."""

    cameras: dict[str, str]
    action: tuple[str, ...]
    proprio: tuple[str, ...]
    pose: tuple[str, Rotation] | None
    instruction: tuple[str, ...]
    rate_hz: float
    spec: ActionSpec | None
    relative_gripper: bool
    orientation: str
    drop_first: bool
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _listed(value: Sequence[str] | None) -> tuple[str, ...] | None:
    """The keys of an option; None: omitted, (): "none" was given."""
    if not value:
        return None
    parts = [p.strip() for p in (value.split(",") if isinstance(value, str) else value)]
    return tuple(p.removeprefix("steps/") for p in parts if p not in ("", "absent", "none"))


def resolve_layout(asked: RldsOptions, dataset: tfds.Dataset) -> RldsLayout:
    """Settle every key and convention.

    Raises:
        DataError: Unknown or contradictory options, all at once, with the existing keys.
    """
    problems: list[str] = []
    preset = _preset(asked, dataset, problems)
    steps = dataset.steps
    known = {
        key: f for key, f in steps.items() if f.kind == "tensor" and f.depth == 1 and f.size > 0 and not f.is_picture
    }
    pictures = {k: f for k, f in steps.items() if f.is_picture}
    cameras = {k.removeprefix("observation/").replace("/", "_"): k for k in pictures}
    if chosen := _listed(asked.cameras):
        problems += [f"cameras: no image {c!r}" for c in chosen if c.replace("/", "_") not in cameras]
        cameras = {c.replace("/", "_"): cameras.get(c.replace("/", "_"), c) for c in chosen}
    if not cameras:
        problems.append("cameras: the dataset has no images")
    choices = list(preset.action) if (a := _listed(asked.action)) is None else [a]
    action = next((c for c in choices if all(k in known for k in c)), None)
    if action is None:
        missing = " or ".join(" + ".join(c) for c in choices)
        problems.append(f"action: no numeric {missing}; name the key with action=KEY (several by commas), or none")
    proprio = p if (p := _listed(asked.proprio)) is not None else tuple(k for k in preset.proprio if k in known)
    pose = _pose_key(asked, preset)
    for option, keys in (("proprio", proprio), ("pose", (pose[0],) if pose else ())):
        problems += [f"{option}: no numeric {k!r}" for k in keys if k not in known]
    if pose and pose[0] in known and known[pose[0]].size < 3 + ROTATION_SIZE[pose[1]]:
        problems.append(f"pose: {pose[0]} ({known[pose[0]]}) has no room for a position and a rotation as {pose[1]}")
    instruction = _instruction(asked, dataset, problems)
    spec = None
    if action:
        spec, unclear = _spec(preset, sum(known[k].size for k in action), action)
        problems += unclear
    if problems or action is None:
        raise DataError("\n".join([*(f"{dataset.folder}: {p}" for p in problems), _inventory(dataset)]))
    return RldsLayout(
        cameras=cameras,
        action=action,
        proprio=proprio,
        pose=pose,
        instruction=instruction,
        rate_hz=float(preset.rate_hz),
        spec=spec,
        relative_gripper=spec is not None and preset.gripper == "relative",
        orientation=preset.orientation,
        drop_first=preset.drop_first,
        options={
            "dataset": dataset.name,
            "action": list(action),
            "proprio": list(proprio),
            "pose": list(pose) if pose else None,
            "instruction": list(instruction),
            "image_orientation": preset.orientation,
            "drop_first": preset.drop_first,
        },
        notes=_notes(asked, preset, proprio, known),
    )


def texts(dataset: tfds.Dataset) -> list[str]:
    """Full names of the string features of steps and of the episode."""
    return [k for k, f in dataset.features.items() if f.depth == k.startswith("steps/") and f.is_text]


def _instruction(asked: RldsOptions, dataset: tfds.Dataset, problems: list[str]) -> tuple[str, ...]:
    """Full names of the instruction's keys: the option's, else those with usual names."""
    there = texts(dataset)
    if (keys := _listed(asked.instruction)) is None:
        return tuple(language_keys(there))
    full = {key: f"steps/{key}" if f"steps/{key}" in dataset.features else key for key in keys}
    said = ", ".join(k.removeprefix("steps/") for k in there) or "none"
    problems += [f"instruction: no text {key!r}; there is: {said}" for key in keys if full[key] not in there]
    return tuple(full.values())


def _notes(asked: RldsOptions, preset: RldsPreset, proprio: Sequence[str], known: Iterable[str]) -> list[str]:
    if _listed(asked.proprio) is not None:
        return []
    if not proprio:
        return no_proprio(k for k in known if k.startswith("observation/"))
    return [f"proprio: no {k}, which {asked.preset or 'such datasets'} have" for k in preset.proprio if k not in known]


def _preset(asked: RldsOptions, dataset: tfds.Dataset, problems: list[str]) -> RldsPreset:
    """The dataset's preset with the given options on top."""
    name = asked.preset or preset_of(dataset.name)
    if asked.preset is not None and asked.preset not in PRESETS:
        problems.append(f"preset: unknown {asked.preset!r}; there are {', '.join(PRESETS)}")
        return RldsPreset(rate_hz=1.0)
    problems += not_one_of(get_args(Mode), mode=asked.mode)
    problems += not_one_of(get_args(Rotation), rotation=asked.rotation, pose_rotation=asked.pose_rotation)
    problems += orientation_problems(asked.image_orientation)
    if name is None:
        if _listed(asked.action) == ():
            needed = ["rate_hz"]
        else:
            needed = ["rate_hz", "mode"] + ([] if asked.mode == "other" else ["rotation", "gripper"])
        if missing := [option for option in needed if getattr(asked, option) is None]:
            problems.append(
                f"unknown dataset {dataset.name!r}, and RLDS does not say what its numbers mean; give "
                f"{', '.join(missing)} (or mode=other to keep actions as they are), or the preset of a dataset like "
                f"it: {', '.join(PRESETS)}"
            )
    preset = PRESETS[name] if name else RldsPreset(rate_hz=1.0)
    changed: dict[str, Any] = {
        option: value for option in ("mode", "rotation", "drop_first") if (value := getattr(asked, option)) is not None
    }
    if asked.image_orientation is not None:
        changed["orientation"] = asked.image_orientation
    for option in ("rate_hz", "metres", "radians"):
        if (value := getattr(asked, option)) is not None:
            try:
                changed[option] = float(value)
            except (TypeError, ValueError):
                problems.append(f"{option}: {value!r} is not a number")
    if changed.get("rate_hz", 1.0) <= 0:
        problems.append(f"rate_hz: {asked.rate_hz} must be positive")
    if asked.gripper is not None:
        changed["gripper"] = parse_gripper(asked.gripper, problems)
    return replace(preset, **changed)


def _pose_key(asked: RldsOptions, preset: RldsPreset) -> tuple[str, Rotation] | None:
    if (keys := _listed(asked.pose)) is None:
        return preset.pose
    return (keys[0], asked.pose_rotation or preset.rotation) if keys else None


def _spec(preset: RldsPreset, dim: int, keys: Sequence[str]) -> tuple[ActionSpec, list[str]]:
    return declared_spec(
        " + ".join(keys),
        dim,
        mode=preset.mode,
        rotation=preset.rotation,
        metres=preset.metres,
        radians=preset.radians,
        gripper=preset.gripper,
    )


def _inventory(dataset: tfds.Dataset) -> str:
    lines = [f"{dataset.name} has below steps/:", *(f"  {key}: {feature}" for key, feature in dataset.steps.items())]
    if beside := {key: feature for key, feature in dataset.features.items() if not key.startswith("steps/")}:
        lines += ["and beside them:", *(f"  {key}: {feature}" for key, feature in beside.items())]
    return "\n".join(lines)
