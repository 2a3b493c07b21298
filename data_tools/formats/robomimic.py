"""robomimic's HDF5 layout (https://robomimic.github.io/docs/datasets/overview.html): one file a task.

data/                attrs: env_args (JSON: env_name, env_kwargs with control_freq and controller_configs), total
  demo_0/            attrs: num_samples, model_file, ep_meta (JSON with lang; newer files)
    actions (T, A), states, rewards, dones
    obs/CAMERA_image (T, H, W, 3), robot0_eef_pos (T, 3), robot0_eef_quat (T, 4; x y z w), robot0_gripper_qpos, …
    next_obs/…
mask/train, valid    names of demos
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from data_tools.formats import hdf5
from data_tools.formats.source import ActionSpec, EpisodeData, EpisodeRef, Scan, find_files
from stamo_dist.errors import DataError

IMAGE = "_image"
POSE = ("robot0_eef_pos", "robot0_eef_quat")
PROPRIO = (*POSE, "robot0_gripper_qpos")
SPLITS = {"train": "train", "valid": "val"}
#: Normalised actions may exceed ±1 by rounding.
NORMALISED = 1.0 + 1e-3


@dataclass
class RobomimicReader:
    """Reads a file or a folder of files in robomimic's HDF5 layout.

    obs[t] was taken before actions[t]. Images are upright: robomimic turns the simulator's over before it stores them.
    The rate and what actions mean come from the `env_args` of the file. The files' own split (mask/train, mask/valid)
    is kept.

    Args:
        src: A .hdf5 file or a folder, searched recursively.
        cameras: Cameras to convert (`obs/CAMERA_image`, or a key of uint8 RGB frames); all when omitted.
        proprio: Keys below obs, side by side; those of the end effector and gripper when omitted.
        action: "delta" or "absolute" end-effector poses, where that is not what the file's controller says (files of
            Diffusion Policy hold absolute poses and still say delta), or "other" to keep actions as they are.
        rate_hz: For files without a control_freq.
        instruction: For files that have none; the environment's name in words when omitted.
    """

    src: Path
    cameras: Sequence[str] | None = None
    proprio: Sequence[str] | None = None
    action: Literal["delta", "absolute", "other"] | None = None
    rate_hz: float | None = None
    instruction: str | None = None

    def scan(self) -> Scan:
        src = Path(self.src)
        files = find_files(src, hdf5.SUFFIXES)
        problems = self._check_options()
        agreement = hdf5.Agreement()
        episodes: list[EpisodeRef] = []
        bad: list[str] = []
        for path in files:
            try:
                with hdf5.open_file(path) as file:
                    episodes += self._scan_file(path, file, agreement, bad)
            except DataError as e:
                problems.append(str(e))
        if problems := problems + agreement.problems():
            raise DataError("\n".join(problems))
        return Scan(
            episodes=episodes,
            files=files,
            cameras=list(agreement["cameras"]),
            rate_hz=agreement["rates in Hz"],
            action=agreement["actions"],
            proprio_dim=agreement["proprio dimensions"],
            options={"proprio": list(agreement["proprio keys"]), "action": self.action},
            bad=bad,
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        path = hdf5.located(Path(self.src), episode.file)
        with hdf5.open_file(path) as file:
            demo = file[f"data/{episode.key}"]
            obs = demo["obs"]
            cameras = _cameras(obs, self.cameras)
            actions = demo["actions"][:]
            proprio = [obs[key][:].reshape(len(actions), -1) for key in self._proprio(obs)]
            return EpisodeData(
                frames={c: hdf5.read_frames(path, obs[key].name) for c, key in cameras.items()},
                times=np.arange(len(actions)) / episode.private["rate_hz"],
                actions=actions,
                proprio=np.concatenate(proprio, axis=1) if proprio else np.zeros((len(actions), 0), np.float32),
                pose=_pose(obs) if all(key in obs for key in POSE) else None,
            )

    def _check_options(self) -> list[str]:
        problems = []
        if self.action not in (None, "delta", "absolute", "other"):
            problems.append(f"action: {self.action!r} must be delta, absolute or other")
        if self.rate_hz is not None and not float(self.rate_hz) > 0:
            problems.append(f"rate_hz: {self.rate_hz} must be positive")
        return problems

    def _proprio(self, obs: h5py.Group) -> list[str]:
        return list(self.proprio) if self.proprio is not None else [key for key in PROPRIO if key in obs]

    def _scan_file(self, path: Path, file: h5py.File, agreement: hdf5.Agreement, bad: list[str]) -> list[EpisodeRef]:
        """The file's usable episodes; adds the others to `bad`.

        Raises:
            DataError: Nothing in this file can be used.
        """
        data = file.get("data")
        demos = hdf5.numbered(data, "demo_") if isinstance(data, h5py.Group) else []
        if not demos:
            raise DataError(f"{path}: no group data/demo_0: not robomimic's HDF5 layout")
        env = hdf5.read_json(data.attrs.get("env_args"))
        rate = self._rate(path, env)
        splits = _splits(file)
        file_name = hdf5.relative(Path(self.src), path)
        stem = file_name.removesuffix(path.suffix)
        task = str(env.get("env_name") or path.stem)
        episodes, faults = [], []
        for key in demos:
            demo, id = data[key], f"{stem}/{key}"
            if fault := self._fault(demo):
                faults.append(f"{id}: {fault}")
                continue
            obs = demo["obs"]
            spec = action_spec(env, demo["actions"].shape[1], self.action)
            _check_range(path, id, demo["actions"], spec)
            cameras = _cameras(obs, self.cameras)
            proprio = self._proprio(obs)
            agreement.note(
                id,
                {
                    "cameras": tuple(cameras),
                    "actions": spec,
                    "proprio keys": tuple(proprio),
                    "proprio dimensions": sum(int(np.prod(obs[k].shape[1:])) for k in proprio),
                    "rates in Hz": rate,
                },
            )
            episodes.append(
                EpisodeRef(
                    id=id,
                    file=file_name,
                    key=key,
                    length=len(demo["actions"]),
                    task=task,
                    instruction=self._instruction(env, demo),
                    split=splits.get(key, ""),
                    meta={"env_name": task, "env_version": env.get("env_version", "")},
                    private={"rate_hz": rate},
                )
            )
        if not episodes:
            raise DataError(f"{path}: none of its {len(demos)} episodes can be used; {faults[0]}")
        bad += faults
        return episodes

    def _rate(self, path: Path, env: Mapping[str, Any]) -> float:
        rate = env.get("env_kwargs", {}).get("control_freq") or self.rate_hz
        if rate is None:
            raise DataError(
                f"{path}: env_args has no env_kwargs.control_freq; give the steps per second with --set rate_hz=HZ"
            )
        return float(rate)

    def _instruction(self, env: Mapping[str, Any], demo: h5py.Group) -> str:
        episode = hdf5.read_json(demo.attrs.get("ep_meta"))
        said = episode.get("lang") or env.get("lang") or env.get("env_lang") or self.instruction
        return str(said) if said else " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", env.get("env_name", ""))).lower()

    def _fault(self, demo: h5py.Group) -> str | None:
        """Why an episode cannot be used, by its shapes alone."""
        obs = demo.get("obs")
        if not isinstance(demo.get("actions"), h5py.Dataset) or not isinstance(obs, h5py.Group):
            return f"no actions or no obs; it has {', '.join(hdf5.keys_below(demo)) or 'nothing'}"
        cameras = _cameras(obs, self.cameras)
        keys = [*(cameras.values() or [f"*{IMAGE}"]), *self._proprio(obs)]
        if missing := hdf5.missing_keys(obs, keys):
            return f"obs has {missing}"
        faults = hdf5.image_faults(obs, list(cameras.values()))
        if demo["actions"].ndim != 2 or not np.issubdtype(demo["actions"].dtype, np.floating):
            faults.append(f"actions are {demo['actions'].dtype} {demo['actions'].shape}, not floats (T, A)")
        lengths = {"actions": len(demo["actions"]), **{f"obs/{key}": len(obs[key]) for key in keys}}
        if len(set(lengths.values())) > 1 or not len(demo["actions"]):
            faults.append("lengths differ: " + ", ".join(f"{key} {n}" for key, n in lengths.items()))
        return "; ".join(faults) or None


def action_spec(env: Mapping[str, Any], dim: int, asked: str | None = None) -> ActionSpec:
    """What robosuite's controller makes of an action, from the file's env_args; the arms' own if there are several.

    OSC_POSE: 1 of a normalised delta is output_max (robosuite/controllers/…/osc.py); absolute poses are metres and a
    rotation vector in the world's frame, not normalised.
    """
    controller = _controller(env.get("env_kwargs", {}))
    kind = str(controller.get("type", "unknown"))
    delta = controller.get("control_delta", controller.get("input_type", "delta") == "delta")
    mode = asked or ("delta" if delta else "absolute")
    turning = 3 if kind == "OSC_POSE" else 0
    pose_size = 3 + turning
    one_arm = dim in (pose_size, pose_size + 1)
    if asked == "other" or kind not in ("OSC_POSE", "OSC_POSITION") or not one_arm:
        return ActionSpec(dim=dim, text=f"robosuite {kind}, {dim} dimensions as stored", mode="other")
    scale = controller.get("output_max", 1.0)
    scale = scale if isinstance(scale, list) else [scale] * pose_size
    metres, radians = (1.0, 1.0) if mode == "absolute" else (float(scale[0]), float(scale[-1]))
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


def _controller(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arm's controller: robosuite's ≤ 1.4 config, or the right arm's part of a composite one (≥ 1.5)."""
    configs = kwargs.get("controller_configs") or {}
    if isinstance(configs, list):
        configs = configs[0] if configs else {}
    parts = configs.get("body_parts") or configs.get("body_parts_controller_configs") or {}
    arms = parts.get("arms", parts)
    return next((arms[side] for side in ("right", "left") if isinstance(arms.get(side), dict)), configs)


def _check_range(path: Path, id: str, actions: h5py.Dataset, spec: ActionSpec) -> None:
    """A normalised action beyond ±1 is no delta.

    Raises:
        DataError: The file says one thing and holds another.
    """
    if spec.mode != "delta":
        return
    largest = float(np.abs(actions[:, list(spec.translation + spec.rotation)]).max())
    if largest > NORMALISED:
        raise DataError(
            f"{path}: actions of {id} reach {largest:.2f}, beyond the ±1 of the delta its controller takes; if they "
            "are poses to reach (as in Diffusion Policy's *_abs.hdf5) give --set action=absolute, else action=other"
        )


def _cameras(obs: h5py.Group, asked: Sequence[str] | None) -> dict[str, str]:
    """Camera → key below obs."""
    if asked is not None:
        return {c.removesuffix(IMAGE): f"{c}{IMAGE}" if f"{c}{IMAGE}" in obs else c for c in asked}
    keys = sorted(key for key in obs if key.endswith(IMAGE) or hdf5.is_images(obs[key]))
    return {key.removesuffix(IMAGE): key for key in keys}


def _pose(obs: h5py.Group) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    position, quat = (obs[key][:] for key in POSE)
    return np.concatenate([position, Rotation.from_quat(quat).as_rotvec()], axis=1)


def _splits(file: h5py.File) -> dict[str, str]:
    """demo → split, of mask/train and mask/valid."""
    found: dict[str, str] = {}
    for mask, split in SPLITS.items():
        names = file.get(f"mask/{mask}")
        if isinstance(names, h5py.Dataset):
            found |= {n.decode() if isinstance(n, bytes) else str(n): split for n in names[:]}
    return found
