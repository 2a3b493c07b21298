"""robomimic's HDF5 layout (https://robomimic.github.io/docs/datasets/overview.html): one file a task.

data/                attrs: env_args (JSON: env_name, env_kwargs with control_freq and controller_configs), total
  demo_0/            attrs: num_samples, model_file, ep_meta (JSON with lang; newer files)
    actions (T, A), states, rewards, dones
    obs/CAMERA_image (T, H, W, 3), robot0_eef_pos (T, 3), robot0_eef_quat (T, 4; x y z w), robot0_gripper_qpos, …
    next_obs/…
mask/train, valid    names of demos
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_tools.formats import hdf5, remarks
from data_tools.formats.checked import object_at, rate, text_at
from data_tools.formats.declared import (
    ActionOptions,
    Mode,
    declared_problems,
    is_declared,
    settle_gripper,
    spec_notes,
    upright,
)
from data_tools.formats.hdf5_language import find_texts, like_language
from data_tools.formats.remarks import language_keys
from data_tools.formats.robomimic_actions import check_range, resolve_actions
from data_tools.formats.rotations import pose_vectors
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Scan, chosen, columns, find_files
from stamo_dist.errors import DataError

IMAGE = "_image"
POSE = ("robot0_eef_pos", "robot0_eef_quat")
PROPRIO = (*POSE, "robot0_gripper_qpos")
SPLITS = {"train": "train", "valid": "val"}


@dataclass
class RobomimicReader(ActionOptions):
    """Reads a file or a folder of files in robomimic's HDF5 layout, also RoboCasa's and Isaac Lab's.

    obs[t] was taken before actions[t]. Images are upright: robomimic flips the simulator's images before storing them.
    The rate and what actions mean come from the `env_args` of the file, or are declared. The files' own split
    (mask/train, mask/valid) is kept. Instructions are those of `ep_meta`, or of attributes and string datasets with a
    usual name (`language_instruction`, `task_description`, `lang`, …), per step if stored so.

    Args:
        src: A .hdf5 file or a folder, searched recursively.
        cameras: Cameras to convert (`obs/CAMERA_image`, or a key of uint8 RGB frames); all when omitted.
        action_keys: Keys below a demonstration whose numbers, side by side, are the action; `actions` when omitted.
        proprio: Keys below obs, side by side; those of the end effector and gripper when omitted; "none" for none.
        action: "delta" or "absolute" end-effector poses, if they differ from the file's controller (files of
            Diffusion Policy hold absolute poses but state delta), "velocity", or "other" to keep actions as they
            are. With any of the next five options, the action is declared in full and env_args are ignored.
        rotation, metres, radians, gripper: See `ActionOptions`.
        gripper_dim: The gripper's dimension, from 0, where others (a mobile base) follow it; the last when omitted.
        pose: Keys below obs whose numbers, side by side, begin with the end effector's position and rotation;
            robot0_eef_pos and robot0_eef_quat when omitted; "none" for none.
        pose_rotation: Rotation of the pose; "quat_xyzw" when omitted.
        rate_hz: For files without a control_freq.
        instruction: For episodes that have none.
        image_orientation: See `ImageOptions`.
        only_successful: Leave out demonstrations whose `success` is false.
    """

    src: Path
    cameras: Sequence[str] | None = None
    action_keys: Sequence[str] = ()
    proprio: Sequence[str] = ()  # default () instead of None, so that "none" is a value
    action: Mode | None = None
    pose: Sequence[str] = ()
    instruction: str | None = None
    only_successful: bool = False

    def scan(self) -> Scan:
        src = Path(self.src)
        files = find_files(src, hdf5.SUFFIXES)
        problems = self._check_options()
        agreement = hdf5.Agreement()
        found = _Found()
        for path in files:
            try:
                with hdf5.open_file(path) as file:
                    self._scan_file(path, file, agreement, found)
            except DataError as e:
                problems.append(str(e))
        if problems := problems + agreement.problems():
            raise DataError("\n".join(problems))
        spec = agreement["actions"]
        episodes, notes = remarks.succeeded(found.episodes, self.only_successful)
        notes += [*found.notes, *remarks.unsaid_instructions(episodes, found.like_language)]
        if not agreement["proprio keys"] and not self.proprio:
            notes += remarks.no_proprio(found.numeric)
        notes += spec_notes(spec, ", the gripper too")
        return Scan(
            episodes=episodes,
            files=files,
            cameras=list(agreement["cameras"]),
            rate_hz=agreement["rates in Hz"],
            action=spec,
            proprio_dim=agreement["proprio dimensions"],
            options={
                "action_keys": self._action_keys(),
                "proprio": list(agreement["proprio keys"]),
                "action": self.action,
                "image_orientation": self.image_orientation,
                "only_successful": self.only_successful,
            },
            bad=found.bad,
            notes=notes,
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        path = hdf5.located(Path(self.src), episode.file)
        with hdf5.open_file(path) as file:
            demo = file[f"data/{episode.key}"]
            obs = demo["obs"]
            length = len(demo[self._action_keys()[0]])
            actions = columns(demo, self._action_keys(), length)
            pose = chosen(self.pose, POSE, obs)
            return EpisodeData(
                frames={
                    camera: upright(hdf5.read_frames(path, obs[key].name), self.image_orientation)
                    for camera, key in _cameras(obs, self.cameras).items()
                },
                times=np.arange(length) / episode.private["rate_hz"],
                actions=settle_gripper(self, actions),
                proprio=columns(obs, self._proprio(obs), length),
                pose=pose_vectors(columns(obs, pose, length), self.pose_rotation or "quat_xyzw")
                if pose and (self.pose or len(pose) == len(POSE))
                else None,
                instructions=find_texts([demo, obs]) if episode.private["by_step"] else None,
            )

    def _check_options(self) -> list[str]:
        problems = declared_problems(self, self.action, "action")
        if self.action == "velocity" and not is_declared(self):
            problems.append("action: velocity also needs rotation and gripper, and their units")
        return problems

    def _action_keys(self) -> list[str]:
        return list(self.action_keys) or ["actions"]

    def _proprio(self, obs: h5py.Group) -> list[str]:
        return chosen(self.proprio, PROPRIO, obs)

    def _scan_file(self, path: Path, file: h5py.File, agreement: hdf5.Agreement, found: _Found) -> None:
        """Add the file's usable episodes, and messages on the others, to `found`.

        Raises:
            DataError: Nothing in this file can be used.
        """
        data, demos = hdf5.demonstrations(path, file, "robomimic")
        env = hdf5.read_json(data, "env_args")
        rate_hz = self._rate(path, env)
        splits = _splits(file)
        file_name = hdf5.relative(Path(self.src), path)
        stem = file_name.removesuffix(path.suffix)
        task = text_at(env, "env_name", hdf5.place(data, "env_args")) or path.stem
        found.notes += hdf5.left_out(path, hdf5.others(data, "demo_"))
        faults = []
        # Cached per file: each call goes through the names of all episodes.
        shared, like = cache(lambda: find_texts([data, file])), cache(lambda: like_language([data]))
        for key in demos:
            demo, id = hdf5.node_once(data, key), f"{stem}/{key}"
            texts: list[str] = []
            try:
                if not (fault := self._fault(demo)):
                    texts = self._texts(env, demo, file, shared)
            except DataError as e:
                fault, texts = str(e), []
            if fault:
                faults.append(f"{id}: {fault}")
                continue
            obs, length = demo["obs"], len(demo[self._action_keys()[0]])
            spec = self._action_spec(path, id, demo, env)
            agreement.note(id, self._properties(obs, spec, rate_hz))
            said = next((text for text in texts if text), self.instruction or "")
            if not said:
                found.like_language.update([*like_language([demo, obs]), *like()])
            if not self._proprio(obs):
                found.numeric = hdf5.numeric(obs)
            found.episodes.append(
                EpisodeRef(
                    id=id,
                    file=file_name,
                    key=key,
                    length=length,
                    task=task,
                    instruction=said,
                    split=splits.get(key, ""),
                    meta=_meta(demo, env, task),
                    private={"rate_hz": rate_hz, "by_step": len(texts) == length and len(set(texts)) > 1},
                )
            )
        if len(faults) == len(demos):
            raise DataError(f"{path}: none of its {len(demos)} episodes can be used; {faults[0]}")
        found.bad += faults

    def _properties(self, obs: h5py.Group, spec: ActionSpec, rate_hz: float) -> dict[str, Any]:
        """What all episodes of a source must agree on, for `hdf5.Agreement`."""
        proprio = self._proprio(obs)
        return {
            "cameras": tuple(_cameras(obs, self.cameras)),
            "actions": spec,
            "proprio keys": tuple(proprio),
            "proprio dimensions": sum(int(np.prod(obs[k].shape[1:])) for k in proprio),
            "rates in Hz": rate_hz,
        }

    def _action_spec(self, path: Path, id: str, demo: h5py.Group, env: Mapping[str, Any]) -> ActionSpec:
        """What the actions of an episode mean; checks that their values fit a meaning taken from env_args.

        Raises:
            DataError: The file's env_args or the options contradict themselves or the actions.
        """
        dim = sum(demo[k].shape[1] for k in self._action_keys())
        try:
            spec = resolve_actions(self, self.action, self.action_keys, env, dim)
        except DataError as e:
            raise DataError(f"{path}: {e}") from e
        if not is_declared(self):
            check_range(path, id, demo[self._action_keys()[0]], spec)
        return spec

    def _rate(self, path: Path, env: Mapping[str, Any]) -> float:
        where = f"{path}: /data: attribute env_args"
        said = object_at(env, "env_kwargs", where).get("control_freq")
        if said is not None:
            return rate(said, f"{where}, env_kwargs.control_freq")
        if self.rate_hz is None:
            raise DataError(
                f"{path}: env_args has no env_kwargs.control_freq; give the steps per second with --set rate_hz=HZ"
            )
        return rate(self.rate_hz, "rate_hz")

    def _texts(
        self, env: Mapping[str, Any], demo: h5py.Group, file: h5py.File, shared: Callable[[], list[str]]
    ) -> list[str]:
        """The episode's instruction, or one per step; [] if it has none. `shared` gives the file's instruction."""
        about, where = hdf5.read_json(demo, "ep_meta"), hdf5.place(demo, "ep_meta")
        said = next((text for k in language_keys(about) if (text := text_at(about, k, where))), "")
        texts = [said] if said else find_texts([demo, demo["obs"]], len(demo[self._action_keys()[0]]))
        if texts:
            return texts
        where, keys = hdf5.place(file["data"], "env_args"), ("lang", "env_lang", *language_keys(env))
        said = next((text for k in keys if (text := text_at(env, k, where))), "")
        return [said] if said else shared()

    def _fault(self, demo: Any) -> str | None:
        """Why an episode cannot be used, judged by shapes and types alone; None if it can."""
        if not isinstance(demo, h5py.Group):
            return "no group"
        obs = hdf5.node(demo, "obs")
        if missing := hdf5.missing_keys(demo, self._action_keys()):
            return missing
        if not isinstance(obs, h5py.Group):
            return f"no obs; it has {', '.join(hdf5.keys_below(demo))}"
        cameras = _cameras(obs, self.cameras)
        keys = [*(cameras.values() or [f"*{IMAGE}"]), *self._proprio(obs), *chosen(self.pose, (), obs)]
        if missing := hdf5.missing_keys(obs, keys):
            return f"obs has {missing}"
        faults = hdf5.image_faults(obs, list(cameras.values()))
        faults += hdf5.number_faults(obs, [key for key in keys if key not in cameras.values()], None)
        actions = {key: demo[key] for key in self._action_keys()}
        for key, values in actions.items():
            if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating):
                faults.append(f"{key} are {values.dtype} {values.shape}, not floats (T, A)")
        lengths = {**{key: len(v) for key, v in actions.items()}, **{f"obs/{key}": len(obs[key]) for key in keys}}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            faults.append("lengths differ: " + ", ".join(f"{key} {n}" for key, n in lengths.items()))
        return "; ".join(faults) or None


@dataclass
class _Found:
    """Results collected while the files are scanned."""

    episodes: list[EpisodeRef] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    like_language: set[str] = field(default_factory=set)
    numeric: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _meta(demo: h5py.Group, env: Mapping[str, Any], task: str) -> dict[str, Any]:
    meta = {"env_name": task, "env_version": env.get("env_version", "")}
    if (success := hdf5.success(demo)) is not None:
        meta["success"] = success
    return meta


def _cameras(obs: h5py.Group, asked: Sequence[str] | None) -> dict[str, str]:
    """Camera → key below obs."""
    if asked is not None:
        return {c.removesuffix(IMAGE): f"{c}{IMAGE}" if f"{c}{IMAGE}" in obs else c for c in asked}
    keys = sorted(key for key in obs if key.endswith(IMAGE) or hdf5.is_images(hdf5.node(obs, key)))
    return {key.removesuffix(IMAGE): key for key in keys}


def _splits(file: h5py.File) -> dict[str, str]:
    """demo → split, of mask/train and mask/valid."""
    found: dict[str, str] = {}
    for mask, split in SPLITS.items():
        if (names := hdf5.node(file, f"mask/{mask}")) is None:
            continue
        if not hdf5.is_texts(names) or names.ndim != 1:
            raise DataError(f"{file.filename}: mask/{mask} is no list of demos' names")
        found |= {hdf5.text(name): split for name in names[:]}
    return found
