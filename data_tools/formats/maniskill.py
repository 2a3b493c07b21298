"""ManiSkill's trajectories (versions 2 and 3): NAME.h5 with NAME.json beside it.

  traj_0/                        T transitions; observations have T + 1 rows, the last one without an action
    obs/sensor_data/CAMERA/rgb   (T + 1, H, W, 3) uint8, upright; version 2: obs/image/CAMERA/rgb
    obs/agent/qpos, obs/extra/tcp_pose (x y z, quaternion w x y z), …
    actions (T, A), terminated, truncated, success (T,), env_states
  NAME.json                      env_info {env_id, env_kwargs}, episodes [{episode_id, control_mode, success, …}]

ManiSkill stores no instruction; a usual key of the JSON's episodes or env_info may hold one (`stamo data simulate`).

Layout: https://maniskill.readthedocs.io/en/latest/user_guide/datasets/demos.html. Units of the Panda's controllers:
mani_skill/agents/robots/panda/panda.py and agents/controllers/pd_ee_pose.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_tools.formats import hdf5, remarks
from data_tools.formats.checked import a_list, a_text, an_object, flag, object_at, rate, read_object, text_at, whole
from data_tools.formats.declared import ImageOptions, not_positive, orientation_problems, upright
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Scan, chosen, columns, find_files
from stamo_dist.errors import DataError

#: Version → path of the images below obs.
IMAGES = {3: "sensor_data", 2: "image"}
POSE = "extra/tcp_pose"
PROPRIO = ("agent/qpos", POSE)
#: x y z and a quaternion.
POSE_SIZE = 7
#: The simulator's default rate, if env_kwargs has no other.
CONTROL_HZ = 20.0


@dataclass
class ManiskillReader(ImageOptions):
    """Reads a .h5 file with its .json, or a folder of such pairs.

    obs[t] was taken before actions[t]; the last observation has no action and is dropped. Files without images (the
    originals, recorded with obs_mode none) are left out if others have images.

    Args:
        src: A .h5 file or a folder, searched recursively.
        cameras: Cameras to convert (`obs/sensor_data/CAMERA/rgb`); all when omitted.
        proprio: Keys below obs, side by side; agent/qpos and extra/tcp_pose, where they exist, when omitted;
            "none" for none.
        rate_hz: Steps per second; control_freq of the file's env_kwargs, else 20, when omitted.
        instruction: What the robot is to do, in all episodes; what the .json says, if it does, when omitted.
        image_orientation: See `ImageOptions`.
        only_successful: Leave failed episodes out.
        success_only: The older name of only_successful.
    """

    src: Path
    cameras: Sequence[str] | None = None
    proprio: Sequence[str] = ()  # default () instead of None, so that "none" is a value
    rate_hz: float | None = None
    instruction: str | None = None
    only_successful: bool = False
    success_only: bool = False

    def scan(self) -> Scan:
        src = Path(self.src)
        files = find_files(src, hdf5.SUFFIXES)
        problems = orientation_problems(self.image_orientation) + not_positive(rate_hz=self.rate_hz)
        agreement = hdf5.Agreement()
        episodes: list[EpisodeRef] = []
        bad: list[str] = []
        blind: list[Path] = []
        said: list[str] = []
        for path in files:
            try:
                with hdf5.open_file(path) as file:
                    if not (trajectories := hdf5.numbered(file, "traj_")):
                        raise DataError(f"{path}: no group traj_0: not ManiSkill's layout")
                    if all(_version(hdf5.node(file, key)) is None for key in trajectories):
                        blind.append(path)
                        continue
                    episodes += self._scan_file(path, file, trajectories, agreement, bad, said)
            except DataError as e:
                problems.append(str(e))
        if blind and len(blind) == len(files):
            problems += [f"{p}: no pictures; replay it with --obs-mode rgb (mani_skill.trajectory)" for p in blind]
        if problems := problems + agreement.problems():
            raise DataError("\n".join(problems))
        only = self.only_successful or self.success_only
        episodes, notes = remarks.succeeded(episodes, only)
        notes += said
        if not episodes:
            raise DataError(f"{src}: no usable episode" + (" that succeeded" if only else ""))
        if not agreement["proprio keys"] and not self.proprio:
            notes += remarks.no_proprio(agreement["numeric keys"])
        like = {key for e in episodes for key in e.private["like_language"]}
        notes += remarks.unsaid_instructions(episodes, like, "--set instruction=TEXT says one for all")
        if blind:
            notes.append(f"files: {len(blind)} without pictures left out: {', '.join(p.name for p in blind)}")
        used = [path for path in files if path not in blind]
        return Scan(
            episodes=episodes,
            files=used + [p for path in used if (p := path.with_suffix(".json")).is_file()],
            cameras=list(agreement["cameras"]),
            rate_hz=agreement["rates in Hz"],
            action=agreement["actions"],
            proprio_dim=agreement["proprio dimensions"],
            options={
                "proprio": list(agreement["proprio keys"]),
                "only_successful": only,
                "image_orientation": self.image_orientation,
                "files_without_pictures": [hdf5.relative(src, p) for p in blind],
            },
            bad=bad,
            notes=notes,
            frame_size=episodes[0].private["frame_size"],
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        path = hdf5.located(Path(self.src), episode.file)
        with hdf5.open_file(path) as file:
            group = file[episode.key]
            obs, actions = group["obs"], group["actions"][:]
            length = len(actions)
            return EpisodeData(
                frames={
                    camera: upright(hdf5.read_frames(path, images.name), self.image_orientation)
                    for camera, images in _cameras(obs, self.cameras).items()
                },
                times=np.arange(length) / episode.private["rate_hz"],
                actions=actions,
                proprio=columns(obs, self._proprio(obs), length),
                pose=_pose(obs[POSE][:length]) if POSE in obs else None,
            )

    def _proprio(self, obs: h5py.Group) -> list[str]:
        return chosen(self.proprio, PROPRIO, obs)

    def _scan_file(
        self,
        path: Path,
        file: h5py.File,
        trajectories: Sequence[str],
        agreement: hdf5.Agreement,
        bad: list[str],
        notes: list[str],
    ) -> list[EpisodeRef]:
        """The file's usable episodes; adds messages on the others to `bad`.

        Raises:
            DataError: Nothing in this file can be used.
        """
        env, told = _read_json(path.with_suffix(".json"))
        where = f"{path.with_suffix('.json')}, env_info"
        kwargs = object_at(env, "env_kwargs", where)
        rate_hz = self._rate(kwargs, where)
        if not (env_id := text_at(env, "env_id", where)):
            raise DataError(f"{where}, env_id: missing; it says which environment this is")
        robot, mode = _robot(kwargs, where), text_at(kwargs, "control_mode", f"{where}.env_kwargs")
        notes += hdf5.left_out(path, hdf5.others(file, "traj_"))
        notes += _missing_trajectories(path, told, trajectories)
        file_name = hdf5.relative(Path(self.src), path)
        stem = file_name.removesuffix(path.suffix)
        like = [f"env_info/{key}" for key, v in env.items() if isinstance(v, str) and remarks.looks_like_language(key)]
        episodes, faults = [], []
        for key in trajectories:
            group, id = hdf5.node_once(file, key), f"{stem}/{key}"
            meta = told.get(int(key.removeprefix("traj_")), {})
            if fault := self._fault(group, meta):
                faults.append(f"{id}: {fault}")
                continue
            told_by = f"{path.with_suffix('.json').name}, episodes of {key}"
            try:
                success = _success(group, meta, told_by)
                control_mode = text_at(meta, "control_mode", told_by) or mode
            except DataError as e:
                faults.append(f"{id}: {e}")
                continue
            agreement.note(id, self._properties(group, control_mode, robot, rate_hz))
            frame_size = next(iter(_cameras(group["obs"], self.cameras).values())).shape[1:3]
            episodes.append(
                EpisodeRef(
                    id=id,
                    file=file_name,
                    key=key,
                    length=len(group["actions"]),
                    task=env_id,
                    instruction=self.instruction or _text(meta) or _text(env),
                    meta={"env_id": env_id, **meta, "success": success},
                    private={"rate_hz": rate_hz, "frame_size": frame_size, "like_language": like},
                )
            )
        if faults and len(faults) == len(trajectories):
            raise DataError(f"{path}: none of its {len(trajectories)} episodes can be used; {faults[0]}")
        bad += faults
        return episodes

    def _rate(self, kwargs: Mapping[str, Any], where: str) -> float:
        """Steps per second: the option, else env_kwargs' control_freq, else CONTROL_HZ."""
        stated = [
            object_at(kwargs, "sim_config", f"{where}.env_kwargs").get("control_freq"),
            kwargs.get("control_freq"),
        ]
        rates = [rate(r, f"{where}.env_kwargs, control_freq") for r in stated if r is not None]
        return float(self.rate_hz or next(iter(rates), CONTROL_HZ))

    def _properties(self, group: h5py.Group, control_mode: str, robot: str, rate_hz: float) -> dict[str, Any]:
        """What all episodes of a source must agree on, for `hdf5.Agreement`."""
        obs, actions = group["obs"], group["actions"]
        proprio = self._proprio(obs)
        return {
            "cameras": tuple(_cameras(obs, self.cameras)),
            "actions": action_spec(control_mode, robot, actions.shape[1], _version(group) or 3),
            "proprio keys": tuple(proprio),
            **({} if proprio else {"numeric keys": tuple(hdf5.numeric(obs))}),
            "proprio dimensions": sum(int(np.prod(obs[k].shape[1:])) for k in proprio),
            "rates in Hz": rate_hz,
        }

    def _fault(self, group: Any, meta: Mapping[str, Any]) -> str | None:
        """Why an episode cannot be used, judged by shapes and types alone; None if it can."""
        if not isinstance(group, h5py.Group):
            return "no group"
        if fault := hdf5.missing_keys(group, ["actions"]):
            return fault
        if not isinstance(obs := hdf5.node(group, "obs"), h5py.Group) or _version(group) is None:
            return f"no pictures; it has {', '.join(hdf5.keys_below(group))}"
        cameras = _cameras(obs, self.cameras)
        if missing := [camera for camera, dataset in cameras.items() if dataset is None]:
            return f"no camera {', '.join(missing)}; it has {', '.join(_cameras(obs, None)) or 'none'}"
        if fault := hdf5.missing_keys(obs, self._proprio(obs)):
            return f"obs has {fault}"
        names = [dataset.name for dataset in cameras.values()]
        faults = hdf5.image_faults(group, names)
        length = len(group["actions"])
        rows = {name.removeprefix(f"{group.name}/"): len(group[name]) for name in names}
        rows |= {f"obs/{key}": len(obs[key]) for key in self._proprio(obs)}
        if wrong := {name: n for name, n in rows.items() if n != length + 1}:
            each = ", ".join(f"{name} {n}" for name, n in wrong.items())
            faults.append(f"observations of {length} actions must have {length + 1} rows: {each}")
        faults += [*hdf5.number_faults(group, ["actions"], (2,)), *hdf5.number_faults(obs, self._proprio(obs), None)]
        if POSE in obs and (fault := _pose_fault(obs)):
            faults.append(fault)
        if not length:
            faults.append("no actions")
        if not meta:
            faults.append("not in the .json's episodes")
        return "; ".join(faults) or None


def _missing_trajectories(path: Path, told: Mapping[int, Any], trajectories: Sequence[str]) -> list[str]:
    """A note on the episodes of the .json that the .h5 file lacks."""
    lost = sorted(told.keys() - {int(key.removeprefix("traj_")) for key in trajectories})
    if not lost:
        return []
    named = ", ".join(f"traj_{k}" for k in lost[:5])
    return [f"left out: {len(lost)} episodes of {path.with_suffix('.json').name} that {path.name} lacks: {named}"]


def action_spec(control_mode: str, robot: str, dim: int, version: int) -> ActionSpec:
    """The meaning of actions of a Panda's end-effector controllers; all other actions are kept unchanged.

    1 is 0.1 m and, in version 2, 0.1 rad. Version 3 multiplies the rotation by `rot_lower`, -0.1, so 1 is -0.1 rad;
    it takes it as Euler angles about the moving axes x, y, z, equal to a rotation vector within 0.003 rad at this size.
    """
    size = {"pos": 3, "pose": 6}.get(control_mode.rsplit("_", 1)[-1], 0)
    understood = re.fullmatch(r"pd_ee_(target_)?delta_(pos|pose)", control_mode) and robot.startswith("panda")
    if not understood or dim != size + 1:
        return ActionSpec(dim=dim, text=f"ManiSkill {control_mode} of {robot}, as stored", mode="other")
    radians = -0.1 if version == 3 else 0.1
    return ActionSpec(
        dim=dim,
        text=f"ManiSkill{version} {control_mode}: dx dy dz (1 = 0.1 m)"
        + (f", rotation vector (1 = {radians:g} rad)" if size == 6 else "")
        + ", gripper 1 open -1 closed"
        + (", added to the last target" if "target" in control_mode else ""),
        mode="delta",
        translation=(0, 1, 2),
        metres=0.1,
        rotation=tuple(range(3, size)),
        radians=radians,
        gripper=size,
        gripper_open=1.0,
        gripper_closed=-1.0,
    )


def _read_json(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """env_info, and the entries of the episodes by number."""
    if not path.exists():
        raise DataError(f"{path}: missing; it says which controller the actions of the .h5 beside it are for")
    told = read_object(path)
    episodes: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(a_list(told.get("episodes"), f"{path}, episodes")):
        where = f"{path}, episodes.{number}"
        id = whole(an_object(entry, where).get("episode_id"), f"{where}.episode_id")
        if id in episodes:
            raise DataError(f"{where}.episode_id: {id} is there twice")
        episodes[id] = entry
    return an_object(told.get("env_info"), f"{path}, env_info"), episodes


def _robot(kwargs: Mapping[str, Any], where: str) -> str:
    """The robot's name; if not stated, the environment's default, nearly always the Panda.

    Raises:
        DataError: It is neither a text nor a list of them.
    """
    for key in ("robot_uids", "robot"):
        if (robot := kwargs.get(key)) is not None:
            robots = [a_text(r, f"{where}.env_kwargs, {key}") for r in (robot if isinstance(robot, list) else [robot])]
            if not all(robots):
                raise DataError(f"{where}.env_kwargs, {key}: must name the robot, not {robot!r:.40}")
            return ", ".join(robots) or "panda"
    return "panda"


def _version(group: h5py.Group) -> int | None:
    """ManiSkill's major version, by the location of images; None without images."""
    obs = hdf5.node(group, "obs") if isinstance(group, h5py.Group) else None
    if not isinstance(obs, h5py.Group):
        return None
    return next((version for version, key in IMAGES.items() if _pictures(hdf5.node(obs, key))), None)


def _pictures(group: Any) -> dict[str, h5py.Dataset]:
    if not isinstance(group, h5py.Group):
        return {}
    found = {
        c: hdf5.node(camera, "rgb") for c in sorted(group) if isinstance(camera := hdf5.node(group, c), h5py.Group)
    }
    return {camera: dataset for camera, dataset in found.items() if hdf5.is_rows(dataset)}


def _cameras(obs: h5py.Group, asked: Sequence[str] | None) -> dict[str, Any]:
    """Camera → its frames, None if it does not exist."""
    there = next((found for key in IMAGES.values() if (found := _pictures(hdf5.node(obs, key)))), {})
    return there if asked is None else {camera: there.get(camera) for camera in asked}


def _success(group: h5py.Group, meta: Mapping[str, Any], where: str) -> bool | None:
    about = meta.get("info")
    said = meta.get("success", about.get("success") if isinstance(about, dict) else None)
    return hdf5.success(group) if said is None else flag(said, f"{where}, success")


def _text(told: Mapping[str, Any]) -> str:
    """The instruction under the first usual key that has one; "": none."""
    texts = (told[key] for key in remarks.language_keys(told))
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), "")


def _pose_fault(obs: h5py.Group) -> str | None:
    """Why the pose cannot be read."""
    if fault := hdf5.missing_keys(obs, [POSE]):
        return fault
    if faults := hdf5.number_faults(obs, [POSE], (2,)):
        return faults[0]
    return None if obs[POSE].shape[1] == POSE_SIZE else f"{POSE} has {obs[POSE].shape[1]} numbers, not {POSE_SIZE}"


def _pose(tcp: np.ndarray) -> np.ndarray:
    """(T, 7) position and quaternion w x y z → (T, 6) position and rotation vector."""
    from scipy.spatial.transform import Rotation

    return np.concatenate([tcp[:, :3], Rotation.from_quat(tcp[:, [4, 5, 6, 3]]).as_rotvec()], axis=1)
