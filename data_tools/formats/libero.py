"""LIBERO's HDF5 layout: official files, OpenVLA's regenerated ones, and those of `stamo data simulate`.

They differ in when an image was taken and in its stored orientation. Our files state both; official files are
recognised by their tag; for others the caller must state them. A wrong guess would pair every action with the wrong
frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_tools.formats import hdf5, remarks
from data_tools.formats.checked import a_text, object_at, rate
from data_tools.formats.declared import TURN, not_one_of, orientation_problems, upright
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Scan, find_files
from stamo_dist.errors import DataError

#: robosuite's OSC_POSE controller with LIBERO's settings.
OSC_POSE = ActionSpec(
    dim=7,
    text="OSC_POSE delta: dx dy dz (1 = 5 cm), rotation vector (1 = 0.5 rad), gripper -1 open +1 close",
    mode="delta",
    translation=(0, 1, 2),
    metres=0.05,
    rotation=(3, 4, 5),
    radians=0.5,
    gripper=6,
    gripper_open=-1.0,
    gripper_closed=1.0,
)
#: Meta-World's actions; see `data_tools.formats.metaworld`.
HAND_DELTA = ActionSpec(
    dim=4,
    text="hand delta dx dy dz (1 = 1 cm), gripper effort (-1 opens, +1 closes)",
    mode="delta",
    translation=(0, 1, 2),
    metres=0.01,
    gripper=3,
    gripper_open=-1.0,
    gripper_closed=1.0,
)

TIMINGS = ("before", "after")
#: robosuite's `macros_image_convention` → orientation of the images.
MACROS = {"opengl": "flipped_vertically", "opencv": "upright"}
#: The tag of LIBERO's own create_dataset.py, which stores obs[t] after actions[t].
OFFICIAL_TAG = "libero-v1"
PROPRIO = ("ee_states", "gripper_states")
DEFAULT_RATE_HZ = 20.0
#: Dimensions of a pose: position and rotation vector.
POSE = 6


@dataclass
class LiberoReader:
    """Reads a file or a folder of files in LIBERO's HDF5 layout.

    Frame t is paired with the action taken at it. If images were stored *after* actions, obs[t] goes with
    actions[t + 1], and the first action and last image are dropped. proprio is ee_states (6) and gripper_states (2).

    Args:
        src: A .hdf5 file or a folder, searched recursively.
        cameras: Cameras to convert (`obs/CAMERA_rgb`); all when omitted.
        image_timing: "before" or "after" the action, for files that do not say.
        image_orientation: "upright", "mirrored", "flipped_vertically" or "rotated_180", for files that do not
            say.
        only_successful: Leave out demonstrations whose `success` is false.
    """

    src: Path
    cameras: Sequence[str] | None = None
    image_timing: str | None = None
    image_orientation: str | None = None
    only_successful: bool = False

    def scan(self) -> Scan:
        scan = self._scan()
        if scan.action is not None and scan.action.text.startswith("hand delta"):
            raise DataError(f"{self.src}: actions are Meta-World's ({scan.action.text}); is it `metaworld`?")
        return scan

    def _scan(self) -> Scan:
        files = find_files(self.src, (".hdf5", ".h5"))
        problems = self._check_options()
        episodes: list[EpisodeRef] = []
        bad: list[str] = []
        notes: list[str] = []
        seen: dict[str, dict[Any, str]] = {}  # property → value → the first episode that has it
        for path in files:
            try:
                with hdf5.open_file(path) as file:
                    episodes += self._scan_file(path, file, seen, bad, notes)
            except DataError as e:
                problems.append(str(e))
        for what, values in seen.items():
            if len(values) > 1:
                each = "; ".join(f"{value} in {where}" for value, where in values.items())
                problems.append(f"{what} differ between episodes: {each}; convert them separately")
        if problems:
            raise DataError("\n".join(problems))
        common = {what: next(iter(values)) for what, values in seen.items()}
        episodes, failures = remarks.succeeded(episodes, self.only_successful)
        notes += failures
        if named := sum(e.private["named"] for e in episodes):
            notes.append(
                f"instructions: {named} of {len(episodes)} episodes have none (problem_info.language_instruction); "
                "taken from the files' names, as LIBERO names them; give others with --instructions FILE.csv"
            )
        return Scan(
            episodes=episodes,
            files=files,
            cameras=list(common["cameras"]),
            rate_hz=common["rates in Hz"],
            action=_action_spec(common["action conventions"], common["action dimensions"]),
            proprio_dim=common["proprio dimensions"],
            options={
                "image_timing": self.image_timing,
                "image_orientation": self.image_orientation,
                "only_successful": self.only_successful,
            },
            bad=bad,
            notes=notes,
            frame_size=episodes[0].private["frame_size"] if episodes else None,
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        path = self.src / episode.file if self.src.is_dir() else self.src
        with hdf5.open_file(path) as file:
            demo = file[f"data/{episode.key}"]
            obs = demo["obs"]
            shift = _shift(episode.private["image_timing"])
            keep = len(demo["actions"]) - shift
            orientation = episode.private["image_orientation"]
            vectors = {key: obs[key][:keep] for key in PROPRIO}
            return EpisodeData(
                frames={
                    c: upright(hdf5.read_frames(path, f"data/{episode.key}/obs/{c}_rgb"), orientation)
                    for c in self.cameras or _cameras(obs)
                },
                times=np.arange(keep) / episode.private["rate_hz"],
                actions=demo["actions"][shift:],
                proprio=np.concatenate(list(vectors.values()), axis=1),
                pose=vectors["ee_states"] if vectors["ee_states"].shape[1] == POSE else None,
            )

    def _check_options(self) -> list[str]:
        return not_one_of(TIMINGS, image_timing=self.image_timing) + orientation_problems(self.image_orientation)

    def _scan_file(
        self, path: Path, file: h5py.File, seen: dict[str, dict[Any, str]], bad: list[str], notes: list[str]
    ) -> list[EpisodeRef]:
        """The file's usable episodes in numerical order; adds the others to `bad` and `notes`.

        Raises:
            DataError: Nothing in this file can be used.
        """
        data, demos = hdf5.demonstrations(path, file, "LIBERO")
        private: dict[str, Any] = {**self._conventions(path, data), "rate_hz": _rate(data)}
        convention = hdf5.attribute_text(data, "action_convention") or OSC_POSE.text
        notes += hdf5.left_out(path, hdf5.others(data, "demo_"))
        relative = path.relative_to(self.src).as_posix() if self.src.is_dir() else path.name
        stem = relative.removesuffix(path.suffix)
        task, instruction = path.stem.removesuffix("_demo"), _instruction(data)
        private["named"] = not instruction
        episodes = []
        faults = []
        for key in demos:
            demo, name = hdf5.node_once(data, key), f"{stem}/{key}"
            if fault := next(self._faults(demo), None):
                faults.append(f"{name}: {fault}")
                continue
            cameras = tuple(self.cameras or _cameras(demo["obs"]))
            shapes = {c: demo["obs"][f"{c}_rgb"].shape[1:3] for c in cameras}
            properties = {
                "cameras": cameras,
                "image sizes": ", ".join(f"{c} {w}×{h} px" for c, (h, w) in shapes.items()),
                "action dimensions": demo["actions"].shape[1],
                "proprio dimensions": sum(demo["obs"][k].shape[1] for k in PROPRIO),
                "rates in Hz": private["rate_hz"],
                "action conventions": convention,
            }
            for what, value in properties.items():
                seen.setdefault(what, {}).setdefault(value, name)
            length = len(demo["actions"]) - _shift(private["image_timing"])
            meta = {} if (success := hdf5.success(demo)) is None else {"success": success}
            private = {**private, "frame_size": next(iter(shapes.values()), None)}
            episodes.append(
                EpisodeRef(name, relative, key, length, task, instruction or _named(path), meta=meta, private=private)
            )
        if not episodes:
            raise DataError(f"{path}: none of its {len(demos)} episodes can be used; {faults[0]}")
        bad += faults
        return episodes

    def _conventions(self, path: Path, data: h5py.Group) -> dict[str, str]:
        """image_timing and image_orientation, from the file, else from the caller.

        Raises:
            DataError: Neither states them.
        """
        names = ("image_timing", "tag", "image_orientation", "macros_image_convention")
        timing, tag, orientation, macros = (hdf5.attribute_text(data, name) for name in names)
        timing = timing or ("after" if tag == OFFICIAL_TAG else self.image_timing)
        orientation = orientation or MACROS.get(macros or "") or self.image_orientation
        unsaid = []
        if timing not in TIMINGS:
            unsaid.append(
                f"{path}: does not say when its images were taken; give --set image_timing=before "
                "(OpenVLA's regenerated files) or after (LIBERO's official files)"
            )
        if orientation not in TURN:
            unsaid.append(
                f"{path}: does not say which way up its images are; give --set "
                "image_orientation=flipped_vertically (as the simulator renders), upright or rotated_180"
            )
        if unsaid:
            raise DataError("\n".join(unsaid))
        return {"image_timing": str(timing), "image_orientation": str(orientation)}

    def _faults(self, demo: h5py.Group) -> Iterator[str]:
        """Why an episode cannot be used, judged by shapes and types alone."""
        if not isinstance(demo, h5py.Group):
            yield "no group"
            return
        obs = hdf5.node(demo, "obs")
        if not hdf5.is_rows(hdf5.node(demo, "actions")) or not isinstance(obs, h5py.Group):
            yield f"no actions or no obs; it has {', '.join(hdf5.keys_below(demo)) or 'nothing'}"
            return
        cameras = self.cameras or _cameras(obs)
        keys = [*PROPRIO, *(f"{c}_rgb" for c in cameras or ["CAMERA"])]
        if missing := [f"obs/{key}" for key in keys if not hdf5.is_rows(hdf5.node(obs, key))]:
            yield f"no {', '.join(missing)}; obs has {', '.join(hdf5.keys_below(obs)) or 'nothing'}"
            return
        yield from hdf5.number_faults(demo, ["actions"], (2,))
        yield from hdf5.number_faults(obs, PROPRIO, (2,))
        for images in (obs[f"{c}_rgb"] for c in cameras):
            if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
                yield f"{images.name} is {images.dtype} {images.shape}, not uint8 RGB (T, H, W, 3)"
        lengths = {"actions": len(demo["actions"]), **{f"obs/{key}": len(obs[key]) for key in keys}}
        if len(set(lengths.values())) > 1:
            yield "lengths differ: " + ", ".join(f"{key} {n}" for key, n in lengths.items())
        if len(demo["actions"]) < 2:
            yield "fewer than 2 steps"


def _action_spec(text: str, dim: int) -> ActionSpec:
    """The meaning of the files' actions; unknown conventions are kept unchanged."""
    if text.startswith("OSC_POSE delta") and dim == 7:
        return replace(OSC_POSE, text=text)
    if text.startswith("hand delta") and dim == 4:  # Meta-World's
        return replace(HAND_DELTA, text=text)
    return ActionSpec(dim, text, "other")


def _shift(image_timing: str) -> int:
    """How many actions precede the first image."""
    return 1 if image_timing == "after" else 0


def _cameras(obs: h5py.Group) -> list[str]:
    return sorted(key.removesuffix("_rgb") for key in obs if key.endswith("_rgb"))


def _rate(data: h5py.Group) -> float:
    if (said := hdf5.attribute(data, "rate_hz")) is not None:
        return rate(said, hdf5.place(data, "rate_hz"))
    where = hdf5.place(data, "env_args")
    said = object_at(hdf5.read_json(data, "env_args"), "env_kwargs", where).get("control_freq", DEFAULT_RATE_HZ)
    return rate(said, f"{where}, env_kwargs.control_freq")


def _instruction(data: h5py.Group) -> str:
    """The instruction in problem_info."""
    said = hdf5.read_json(data, "problem_info").get("language_instruction")
    where = f"{hdf5.place(data, 'problem_info')}, language_instruction"
    if isinstance(said, list):
        return " ".join(a_text(word, where) for word in said)
    return "" if said is None else a_text(said, where).strip()


def _named(path: Path) -> str:
    """The instruction in a file's name, following LIBERO's naming."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", path.stem.removesuffix("_demo")).replace("_", " ")
