"""Real pictures in the layouts of data sets that are not at hand: simulated LIBERO episodes, hand-held videos."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import simplejpeg

VIEWS = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}
OSC_POSE = {
    "type": "OSC_POSE", "control_delta": True,
    "output_max": [0.05] * 3 + [0.5] * 3, "output_min": [-0.05] * 3 + [-0.5] * 3,
}  # fmt: skip
SERIALS = {"ext1": "22008760", "ext2": "24400334", "wrist": "18026681"}

Pictures = dict[str, np.ndarray]  # camera → uint8 (T, H, W, 3)


def libero_episodes(path: Path) -> Iterator[tuple[Pictures, np.ndarray]]:
    """Upright pictures and actions (T, 7) of each episode of a LIBERO file."""
    with h5py.File(path) as file:
        for demo in file["data"].values():
            yield {camera: demo["obs"][key][:][:, ::-1] for camera, key in VIEWS.items()}, demo["actions"][:]


def write_robomimic(path: Path, source: Path) -> Path:
    """As robomimic's dataset_states_to_obs.py --compress stores them."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        env = {"control_freq": 20, "robots": ["Panda"], "controller_configs": OSC_POSE}
        data.attrs["env_args"] = json.dumps({"env_name": "PickPlaceCan", "type": 1, "env_kwargs": env})
        for k, (pictures, actions) in enumerate(libero_episodes(source)):
            demo = data.create_group(f"demo_{k}")
            demo["actions"] = actions.clip(-1, 1)
            for camera, frames in pictures.items():
                demo.create_dataset(f"obs/{camera}_image", data=frames, compression="gzip")
            demo["obs/robot0_eef_pos"] = np.zeros((len(actions), 3))
            demo["obs/robot0_eef_quat"] = np.tile([0.0, 0.0, 0.0, 1.0], (len(actions), 1))
            demo["obs/robot0_gripper_qpos"] = np.zeros((len(actions), 2))
    return path


def write_maniskill(path: Path, source: Path) -> Path:
    """As ManiSkill's RecordEpisode stores them: one observation more than actions."""
    told: list[dict[str, Any]] = []
    with h5py.File(path, "w") as file:
        for k, (pictures, actions) in enumerate(libero_episodes(source)):
            group, length = file.create_group(f"traj_{k}"), len(actions) - 1
            group["actions"] = actions[:length].clip(-1, 1).astype(np.float32)
            group["terminated"] = group["truncated"] = np.zeros(length, bool)
            group["success"] = np.arange(length) == length - 1
            for camera, frames in pictures.items():
                name = f"obs/sensor_data/{camera}/rgb"
                group.create_dataset(name, data=frames, compression="gzip", compression_opts=5)
            group["obs/agent/qpos"] = np.zeros((len(actions), 9), np.float32)
            told.append({"episode_id": k, "control_mode": "pd_ee_delta_pose", "success": True})
    env = {"env_id": "PickCube-v1", "env_kwargs": {"obs_mode": "rgb", "control_mode": "pd_ee_delta_pose"}}
    path.with_suffix(".json").write_text(json.dumps({"env_info": env, "episodes": told}))
    return path


def write_metaworld(path: Path, source: Path) -> Path:
    """As `stamo data simulate metaworld` stores them: LIBERO's layout, one camera, four numbers an action."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(
            env_args=json.dumps({"env_name": "drawer-open-v3"}), image_orientation="flipped_vertically",
            image_timing="before", rate_hz=80.0,
            problem_info=json.dumps({"problem_name": "drawer-open-v3", "language_instruction": "drawer open"}),
        )  # fmt: skip
        for k, (pictures, actions) in enumerate(libero_episodes(source)):
            demo, frames = data.create_group(f"demo_{k}"), pictures["agentview"][:, ::-1]
            chunks = (1, *frames.shape[1:])
            demo.create_dataset("obs/corner3_rgb", data=frames, compression="gzip", chunks=chunks)
            demo["actions"] = actions[:, [0, 1, 2, 6]].clip(-1, 1)
            demo["obs/ee_states"] = np.zeros((len(actions), 6))
            demo["obs/gripper_states"] = np.zeros((len(actions), 2))
            demo["states"] = np.arange(len(actions), dtype=float)[:, None]
    return path


def resized(frames: np.ndarray, width: int, height: int) -> np.ndarray:
    """Pictures (T, H, W, 3) at another size."""
    from PIL import Image

    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames])


def write_calvin(root: Path, source: Path) -> Path:
    """A split of CALVIN: a compressed .npz a frame, pictures of 200 and 84 px."""
    split, number, ends = root / "training", 0, []
    split.mkdir(parents=True)
    for pictures, actions in libero_episodes(source):
        static = resized(pictures["agentview"], 200, 200)
        gripper = resized(pictures["robot0_eye_in_hand"], 84, 84)
        ends.append((number, number + len(actions) - 1))
        for t, action in enumerate(actions):
            np.savez_compressed(
                split / f"episode_{number:07d}.npz", rgb_static=static[t], rgb_gripper=gripper[t],
                depth_static=static[t, ..., 0].astype(np.float32), robot_obs=np.zeros(15), scene_obs=np.zeros(24),
                actions=action, rel_actions=action.clip(-1, 1),
            )  # fmt: skip
            number += 1
    np.save(split / "ep_start_end_ids.npy", np.array(ends))
    return root


def write_aloha(path: Path, source: Path) -> Path:
    """An ALOHA episode: two cameras of 640 × 480 px as padded JPEGs."""
    pictures, actions = next(libero_episodes(source))
    with h5py.File(path, "w") as file:
        file["action"] = file["observations/qpos"] = np.zeros((len(actions), 14))
        for camera, frames in pictures.items():
            jpegs = [np.frombuffer(simplejpeg.encode_jpeg(f, 50), np.uint8) for f in resized(frames, 640, 480)]
            longest = max(map(len, jpegs))
            file[f"observations/images/{camera}"] = np.stack([np.pad(row, (0, longest - len(row))) for row in jpegs])
    return path


def write_zarr(path: Path, source: Path, copies: int = 80) -> Path:
    """A ReplayBuffer as Push-T's: 25 thousand pictures of 96 px in compressed chunks of 161 rows; episodes repeated."""
    import zarr

    found = [(resized(p["agentview"], 96, 96), a.astype(np.float32)) for p, a in libero_episodes(source)] * copies
    group = zarr.open_group(str(path), mode="w", **({"zarr_format": 2} if zarr.__version__ >= "3" else {}))
    make = group.create_array if hasattr(group, "create_array") else group.create_dataset
    ends = np.cumsum([len(actions) for _, actions in found])
    for key, rows in (
        ("data/img", np.concatenate([images for images, _ in found])),
        ("data/action", np.concatenate([actions for _, actions in found])),
        ("data/state", np.zeros((ends[-1], 5), np.float32)),
        ("meta/episode_ends", ends),
    ):
        make(key, shape=rows.shape, chunks=(min(161, len(rows)), *rows.shape[1:]), dtype=rows.dtype)[:] = rows
    return path


def write_rosbag(path: Path, source: Path) -> Path:
    """An MCAP bag: a raw camera of 640 × 480 px and one of JPEGs at 30 Hz, joints at 100 Hz."""
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_HUMBLE)
    header = store.types["std_msgs/msg/Header"](store.types["builtin_interfaces/msg/Time"](0, 0), "")
    pictures, actions = next(libero_episodes(source))
    front, hand = (resized(frames, 640, 480) for frames in pictures.values())
    said: list[tuple[int, str, Any]] = []
    for t in range(len(actions)):
        at, jpeg = t * 33_333_333, simplejpeg.encode_jpeg(hand[t], 80)
        raw = store.types["sensor_msgs/msg/Image"](header, 480, 640, "rgb8", 0, 1920, front[t].ravel())
        small = store.types["sensor_msgs/msg/CompressedImage"](header, "jpeg", np.frombuffer(jpeg, np.uint8))
        said += [(at, "/front/image_raw", raw), (at, "/hand/compressed", small)]
    for t in range(len(actions) * 10 // 3):
        joints = np.zeros(7)
        names = [f"j{k}" for k in range(7)]
        message = store.types["sensor_msgs/msg/JointState"](header, names, joints, joints, joints)
        said.append((t * 10_000_000, "/joint_states", message))
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections: dict[str, Any] = {}
        for at, topic, message in sorted(said, key=lambda entry: entry[0]):
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=store)
            writer.write(connections[topic], at, bytes(store.serialize_cdr(message, kind)))
    return path


def write_droid(root: Path, frames: Iterable[np.ndarray], steps: int) -> Path:
    """One of DROID's raw episodes: three h264 films of 1280 × 720 px, a frame a step."""
    import av
    from PIL import Image

    folder = root / "AUTOLab" / "success" / "2023-07-07" / "Fri_Jul__7_09:42:23_2023"
    (folder / "recordings" / "MP4").mkdir(parents=True)
    pictures = iter(frames)
    for serial in SERIALS.values():
        with av.open(str(folder / "recordings" / "MP4" / f"{serial}.mp4"), "w") as container:
            stream = container.add_stream("h264", rate=60, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
            for picture in islice(pictures, steps):
                margin = (picture.shape[0] - picture.shape[1] * 9 // 16) // 2  # to 16:9
                wide = Image.fromarray(picture[margin : len(picture) - margin]).resize((1280, 720))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(wide), format="rgb24")))
            container.mux(stream.encode())
    with h5py.File(folder / "trajectory.h5", "w") as file:
        for group in ("action", "observation/robot_state"):
            file[f"{group}/cartesian_position"] = np.zeros((steps, 6))
            file[f"{group}/gripper_position"] = np.zeros(steps)
        file["observation/robot_state/joint_positions"] = np.zeros((steps, 7))
        file["observation/timestamp/skip_action"] = np.zeros(steps, bool)
        file["observation/timestamp/control/step_start"] = 1688748143000 + np.arange(steps) * 66
    serials = {f"{camera}_cam_serial": serial for camera, serial in SERIALS.items()}
    about = {"uuid": "AUTOLab+84bd5053", "success": True, "current_task": "Move object", "trajectory_length": steps}
    (folder / "metadata_AUTOLab+84bd5053.json").write_text(json.dumps(about | serials))
    return root
