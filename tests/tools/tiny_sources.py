"""A tiny valid dataset of every format: three episodes of a few frames of 32 px."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from films import film
from records import TEXT, image, png, tensor, write_tfds

SIDE = 32
LENGTHS = (5, 6, 7)
HZ = 10


def pixels(episode: int, camera: int = 0, length: int | None = None) -> np.ndarray:
    """Frame t of an episode is one colour that tells episode, frame and camera, with a brighter upper left corner."""
    n = LENGTHS[episode] if length is None else length
    frames = np.zeros((n, SIDE, SIDE, 3), np.uint8)
    frames[..., 0] = (20 + 25 * np.arange(n))[:, None, None]
    frames[..., 1] = 30 + 60 * episode
    frames[..., 2] = 40 + 100 * camera
    frames[:, :8, :8] = 250
    return frames


def numbers(seed: int, *shape: int, scale: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-scale, scale, shape)


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    dump(path, "".join(f"{json.dumps(row)}\n" for row in rows))


# --- LeRobot ----------------------------------------------------------------------------------------------------------

CAMERA = "observation.images.front"
TASKS = ("wave", "bow", "valid")


def _lerobot_columns(e: int, first: int) -> dict[str, Any]:
    n = LENGTHS[e]
    return {
        "action": pa.array(numbers(e, n, 3).tolist(), pa.list_(pa.float32())),
        "observation.state": pa.array(numbers(e + 9, n, 2).tolist(), pa.list_(pa.float32())),
        "timestamp": pa.array(np.arange(n, dtype=np.float32) / HZ),
        "frame_index": pa.array(range(n)),
        "episode_index": pa.array([e] * n),
        "index": pa.array(range(first, first + n)),
        "task_index": pa.array([e % 2] * n),
    }


def _lerobot_info(root: Path, camera: str, **more: Any) -> None:
    features = {
        "action": {"dtype": "float32", "shape": [3], "names": {"motors": ["hip", "knee", "claw"]}},
        "observation.state": {"dtype": "float32", "shape": [2], "names": None},
        CAMERA: {"dtype": camera, "shape": [SIDE, SIDE, 3], "names": ["height", "width", "channels"],
                 "info": {"video.fps": HZ, "video.is_depth_map": False}},
        **{name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index", "task_index")},
        "timestamp": {"dtype": "float32", "shape": [1]},
        **more.pop("features", {}),
    }  # fmt: skip
    dump(root / "meta/info.json", {"codebase_version": "v2.1", "robot_type": "so100", "total_episodes": 3, "fps": HZ,
                                   "splits": {"train": "0:3"}, "features": features, **more})  # fmt: skip


def lerobot_v21(root: Path) -> None:
    _lerobot_info(root, "video")
    first = 0
    for e, n in enumerate(LENGTHS):
        path = root / f"data/chunk-000/episode_{e:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(_lerobot_columns(e, first)), path)
        film(root / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4", list(pixels(e)), rate=HZ)
        first += n
    lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(TASKS[:2])])
    lines(root / "meta/episodes.jsonl",
          [{"episode_index": e, "tasks": [TASKS[e % 2]], "length": n} for e, n in enumerate(LENGTHS)])  # fmt: skip


def lerobot_groot(root: Path) -> None:
    """Images in parquet; GR00T's annotation, modality.json, and a task that changes within an episode."""
    note = "annotation.human.action.task_description"
    _lerobot_info(root, "image", features={note: {"dtype": "int64", "shape": [1]}})
    first = 0
    for e, n in enumerate(LENGTHS):
        columns = _lerobot_columns(e, first)
        columns[note] = pa.array([int(t > 2) for t in range(n)])
        columns[CAMERA] = pa.array([{"bytes": png(p), "path": None} for p in pixels(e)])
        path = root / f"data/chunk-000/episode_{e:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        first += n
    lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(TASKS)])
    lines(root / "meta/episodes.jsonl",
          [{"episode_index": e, "tasks": list(TASKS), "length": n} for e, n in enumerate(LENGTHS)])  # fmt: skip
    dump(root / "meta/modality.json", {
        "action": {"arm": {"start": 0, "end": 2}, "claw": {"start": 2, "end": 3, "original_key": "action"}},
        "state": {"arm": {"start": 0, "end": 2, "original_key": "observation.state"}},
    })  # fmt: skip


def lerobot_v30(root: Path) -> None:
    """Two episodes in one file, the third in another; tasks and episodes in parquet."""
    _lerobot_info(root, "video", codebase_version="v3.0")
    rows, first = [], 0
    for file, episodes in enumerate(((0, 1), (2,))):
        data, shown, start = [], [], 0.0
        for e in episodes:
            n = LENGTHS[e]
            data.append(pa.table(_lerobot_columns(e, first)))
            shown += list(pixels(e))
            at = {"chunk_index": 0, "file_index": file}
            rows.append({
                "episode_index": e, "tasks": [TASKS[e % 2]], "length": n, "dataset_from_index": first,
                "dataset_to_index": first + n, **{f"data/{k}": v for k, v in at.items()},
                **{f"videos/{CAMERA}/{k}": v for k, v in at.items()},
                f"videos/{CAMERA}/from_timestamp": start, f"videos/{CAMERA}/to_timestamp": start + n / HZ,
            })  # fmt: skip
            first, start = first + n, start + n / HZ
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(data), path)
        film(root / f"videos/{CAMERA}/chunk-000/file-{file:03d}.mp4", shown, rate=HZ, gop=2)
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task_index": [0, 1], "__index_level_0__": list(TASKS[:2])}), root / "meta/tasks.parquet")


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def libero(root: Path, actions: int = 7, rate: float = 20.0) -> None:
    with h5py.File(root / "open_the_drawer_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs.update(image_timing="after", image_orientation="flipped_vertically", rate_hz=rate, tag="libero-v1")
        data.attrs["problem_info"] = json.dumps({"language_instruction": ["open", "the", "drawer"]})
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        if actions == 4:
            data.attrs["action_convention"] = "hand delta dx dy dz (1 = 1 cm), gripper effort (-1 opens, +1 closes)"
        for e, n in enumerate(LENGTHS):
            file[f"data/demo_{e}/actions"] = numbers(e, n, actions)
            file[f"data/demo_{e}/obs/agentview_rgb"] = pixels(e)
            file[f"data/demo_{e}/obs/ee_states"] = numbers(e + 5, n, 6)
            file[f"data/demo_{e}/obs/gripper_states"] = numbers(e + 7, n, 2)
            file[f"data/demo_{e}"].attrs["success"] = True


def metaworld(root: Path) -> None:
    libero(root, actions=4, rate=80.0)


OSC = {"type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
       "control_delta": True}  # fmt: skip


def robomimic(root: Path) -> None:
    with h5py.File(root / "can.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(LENGTHS)
        data.attrs["env_args"] = json.dumps({
            "env_name": "PickPlaceCan", "type": 1, "env_version": "1.4.1", "lang": "lift the can",
            "env_kwargs": {"robots": ["Panda"], "control_freq": 20, "controller_configs": OSC},
        })  # fmt: skip
        for e, n in enumerate(LENGTHS):
            demo = data.create_group(f"demo_{e}")
            demo.attrs.update(num_samples=n, success=True)
            if e == 1:
                demo.attrs["ep_meta"] = json.dumps({"lang": "drop the can"})
            demo["actions"] = numbers(e, n, 7)
            demo["obs/robot0_eef_pos"] = numbers(e + 3, n, 3)
            demo["obs/robot0_eef_quat"] = np.tile([0, 0, np.sqrt(0.5), np.sqrt(0.5)], (n, 1))
            demo["obs/robot0_gripper_qpos"] = numbers(e + 6, n, 2)
            demo["obs/agentview_image"] = pixels(e)
            if e == 2:
                demo["obs/language_instruction"] = ["go", *["grasp"] * (n - 1)]
        file["mask/train"], file["mask/valid"] = np.array([b"demo_0", b"demo_2"]), np.array([b"demo_1"])


def aloha(root: Path, encoded: bool = False) -> None:
    for e, n in enumerate(LENGTHS):
        with h5py.File(root / f"episode_{e}.hdf5", "w") as file:
            file.attrs.update(sim=True, compress=encoded, language_instruction="fold the shirt", success=True)
            file["action"], file["observations/qpos"] = numbers(e, n, 14), numbers(e + 3, n, 14)
            file["observations/qvel"] = np.zeros((n, 14))
            if not encoded:
                file["observations/images/cam_high"] = pixels(e)
                continue
            jpegs = [np.frombuffer(simplejpeg.encode_jpeg(p, 95, "RGB", "444"), np.uint8) for p in pixels(e)]
            if e == 0:
                padded = np.zeros((n, max(map(len, jpegs)) + 3), np.uint8)
                for row, one in zip(padded, jpegs, strict=True):
                    row[: len(one)] = one
                file["observations/images/cam_high"] = padded
                file["compress_len"] = np.array([[float(len(one)) for one in jpegs]])
            else:
                rows = file.create_dataset("observations/images/cam_high", (n,), h5py.vlen_dtype(np.uint8))
                for t, one in enumerate(jpegs):
                    rows[t] = one


def maniskill(root: Path) -> None:
    told = []
    with h5py.File(root / "PickCube-v1.h5", "w") as file:
        for e, n in enumerate(LENGTHS):
            pose = np.concatenate([numbers(e, n + 1, 3), np.tile([0, 1, 0, 0], (n + 1, 1))], axis=1)
            file[f"traj_{e}/actions"] = numbers(e + 2, n, 7).astype(np.float32)
            file[f"traj_{e}/success"] = np.arange(n) == n - 1
            file[f"traj_{e}/obs/agent/qpos"] = numbers(e + 4, n + 1, 9).astype(np.float32)
            file[f"traj_{e}/obs/extra/tcp_pose"] = pose.astype(np.float32)
            file[f"traj_{e}/obs/sensor_data/base_camera/rgb"] = pixels(e, length=n + 1)
            told.append({"episode_id": e, "control_mode": "pd_ee_delta_pose", "elapsed_steps": n, "success": True,
                         "info": {"success": True}, "reset_kwargs": {"seed": e}})  # fmt: skip
    env = {"env_id": "PickCube-v1", "env_kwargs": {"obs_mode": "rgb", "control_mode": "pd_ee_delta_pose",
           "robot_uids": "panda", "sim_config": {"control_freq": 20}}}  # fmt: skip
    dump(root / "PickCube-v1.json", {"env_info": env, "episodes": told, "source_type": "rl"})


DROID_SERIALS = {"ext1": "22008760", "ext2": "24400334", "wrist": "18026681"}


def droid_raw(root: Path) -> None:
    said = {}
    for e, n in enumerate(LENGTHS):
        folder = root / f"AUTOLab/success/2023-07-07/episode_{e}"
        folder.mkdir(parents=True)
        with h5py.File(folder / "trajectory.h5", "w") as file:
            file.attrs.update(current_task="Move object", success=True)
            for k, group in enumerate(("action", "observation/robot_state")):
                file[f"{group}/cartesian_position"] = numbers(e + k, n, 6)
                file[f"{group}/gripper_position"] = np.abs(numbers(e + k + 3, n))
            file["observation/robot_state/joint_positions"] = numbers(e + 8, n, 7)
            file["observation/timestamp/skip_action"] = np.arange(n) == 1
            file["observation/timestamp/control/step_start"] = 1688748143000 + np.arange(n) * 66
            for k, serial in enumerate(DROID_SERIALS.values()):
                stamps = 1688748143000 + np.arange(n) * 67 + k
                file[f"observation/timestamp/cameras/{serial}_estimated_capture"] = stamps
                film(folder / f"recordings/MP4/{serial}.mp4", list(pixels(e, k, n + 1)), rate=60)
                file[f"observation/camera_type/{serial}"] = np.full(n, int(k < 2))
        uuid = f"AUTOLab+84bd5053+2023-07-07-09h-42m-2{e}s"
        if e < 2:  # the third one's metadata are only in its HDF5
            dump(folder / f"metadata_{uuid}.json", {
                "uuid": uuid, "lab": "AUTOLab", "success": True, "current_task": "Move object", "trajectory_length": n,
                **{f"{camera}_cam_serial": serial for camera, serial in DROID_SERIALS.items()},
            })  # fmt: skip
        said[uuid] = {
            "language_instruction1": f"put it in box {e}",
            "language_instruction2": "",
            "language_instruction3": "",
        }
    dump(root / "aggregated-annotations-030724.json", said)


# --- zarr, RLDS -------------------------------------------------------------------------------------------------------


def zarr(root: Path, version: int = 2) -> None:
    import zarr as library

    how = {"zarr_format": version} if library.__version__ >= "3" else {}
    group = library.open_group(str(root / "pusht.zarr"), mode="w", **how)
    rows = {
        "data/img": np.concatenate([pixels(e) for e in range(3)]),
        "data/action": numbers(1, sum(LENGTHS), 2).astype(np.float32),
        "data/state": numbers(2, sum(LENGTHS), 5).astype(np.float32),
        "data/timestamp": np.concatenate([np.arange(n) / HZ for n in LENGTHS]),
        "meta/episode_ends": np.cumsum(LENGTHS),
    }
    for key, values in rows.items():
        make = group.create_array if hasattr(group, "create_array") else group.create_dataset
        make(key, shape=values.shape, chunks=(8, *values.shape[1:]), dtype=values.dtype)[:] = values


def zarr3(root: Path) -> None:
    zarr(root, 3)


def rlds(root: Path) -> None:
    steps = {"action": tensor("float32", 7), "language_instruction": TEXT, "observation/state": tensor("float32", 3),
             "observation/image": image(SIDE, SIDE, 3), "is_first": tensor("bool")}  # fmt: skip
    episodes = [
        {
            "steps/action": numbers(e, n, 7),
            "steps/language_instruction": [b"push it"] * n if e else [b"open", *[b"shut"] * (n - 1)],
            "steps/observation/state": numbers(e + 4, n, 3),
            "steps/observation/image": [png(p) for p in pixels(e)],
            "steps/is_first": np.arange(n) == 0,
            "episode_metadata/file_path": [f"/raw/{e}".encode()],
            "episode_metadata/success": np.array([True]),
        }
        for e, n in enumerate(LENGTHS)
    ]
    write_tfds(root / "robot" / "1.0.0", "robot", steps, episodes, shards=2, metadata={"success": tensor("bool")})


# --- video ------------------------------------------------------------------------------------------------------------

UIDS = ("001e3e4e-2743-47fc-8564-d5efd11f9e90", "101e3e4e-2743-47fc-8564-d5efd11f9e91")
RATE = 20


def shots(path: Path, episode: int) -> None:
    film(path, list(pixels(episode, length=20)), rate=RATE)


def video_table(root: Path) -> None:
    for e in range(2):
        shots(root / f"raw/v{e}.mp4", e)
    dump(root / "cuts.csv", "video,start,end,text,id,split\nv0.mp4,00:00.1,0.5,lift,a,train\nv0,0.5,0.9,drop,b,train\n"
         "v1.mp4,0.2,0.8,pour,c,val\n")  # fmt: skip
    dump(root / "labels.json", {"v0.mp4": "tidy", "v1": "cook"})


def video_json(root: Path) -> None:
    for e in range(2):
        shots(root / f"raw/v{e}.mp4", e)
    dump(root / "cuts.json", {"v0.mp4": [{"start": 0.1, "end": 0.5, "text": "lift", "id": "a"},
         {"start": "0:00.5", "end": 0.9, "text": "drop", "id": "b"}],
         "v1.mp4": [{"start": 0.2, "text": "pour", "id": "c"}]})  # fmt: skip
    dump(root / "labels.json", [{"video": "v0.mp4", "text": "tidy"}, {"id": "v1", "label": "cook"}])


def ssv2(root: Path) -> None:
    for e, name in enumerate(("74225", "116154")):
        shots(root / f"{name}.mp4", e)
    dump(root / "something-something-v2-train.json", [{"id": "74225", "label": "spinning cube", "template":
         "Spinning [something]", "placeholders": ["cube"]}])  # fmt: skip
    dump(root / "something-something-v2-validation.json", [{"id": "116154", "template":
         "Putting [something] on [a box]", "placeholders": ["a cup", "a tray"]}])  # fmt: skip


def epic(root: Path) -> None:
    shots(root / "P01/videos/P01_102.mp4", 0)
    shots(root / "P01/videos/P01_103.mp4", 1)
    head = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,narration,verb,noun"
    dump(root / "EPIC_100_train.csv", f"{head}\nP01_102_0,P01,P01_102,00:00:00.10,00:00:00.40,2,take knife,take,knife\n"
         "P01_103_0,P01,P01_103,00:00:00.40,00:00:00.80,8,open door,open,door\n")  # fmt: skip


def egoexo4d(root: Path) -> None:
    takes = []
    for e, name in enumerate(("cmu_bike_1", "cmu_bike_2")):
        shots(root / f"takes/{name}/frame_aligned_videos/aria01_214-1.mp4", e)
        rgb = {"rgb": {"relative_path": "frame_aligned_videos/aria01_214-1.mp4"}}
        cam = {"0": {"relative_path": "frame_aligned_videos/cam01.mp4"}}
        takes.append({"take_name": name, "take_uid": f"u{e}", "root_dir": f"takes/{name}",
                      "task_name": "Remove a Wheel",
                      "parent_task_name": "Bike Repair", "university_name": "cmu",
                      "frame_aligned_videos": {"aria01": rgb, "cam01": cam}})  # fmt: skip
    dump(root / "takes.json", takes)
    dump(root / "annotations/keystep_val.json", {"annotations": {"u0": {"segments": [
        {"start_time": 0.1, "end_time": 0.4, "step_description": "loosen"},
        {"start_time": 0.4, "end_time": 0.9, "step_description": "pull"}]}}})  # fmt: skip
    dump(root / "annotations/atomic_descriptions_val.json", {"annotations": {"u1": [{"rejected": False,
        "descriptions": [{"text": "C grips", "timestamp": 0.3, "ego_visible": "1"},
                         {"text": "C lifts", "timestamp": 0.7}]}]}})  # fmt: skip


def ego4d(root: Path) -> None:
    for e, uid in enumerate(UIDS):
        shots(root / f"full_scale/{uid}.mp4", e)
    passes = {"narration_pass_1": {"narrations": [
        {"timestamp_sec": 0.2, "narration_text": "#C C lifts", "annotation_uid": "x"},
        {"timestamp_sec": 0.7, "narration_text": "#C C opens", "annotation_uid": "y"}]}}  # fmt: skip
    dump(root / "annotations/narration.json", {UIDS[0]: passes, UIDS[1]: passes})


def ego4d_moments(root: Path) -> None:
    for e, uid in enumerate(UIDS):
        shots(root / f"full_scale/{uid}.mp4", e)
    dump(root / "moments_train.json", {"videos": [{"video_uid": uid, "split": "train", "clips": [{
        "clip_uid": "c", "video_start_sec": 0.0, "video_end_sec": 1.0, "annotations": [{"labels": [
            {"start_time": 9, "end_time": 10, "video_start_time": 0.1, "video_end_time": 0.5, "label": "wash"},
            {"start_time": 9, "end_time": 10, "video_start_time": 0.5, "video_end_time": 0.9, "label": "dry"}]}],
    }]} for uid in UIDS]})  # fmt: skip


def egodex(root: Path) -> None:
    for e in range(2):
        shots(root / f"part1/lid/{e}.mp4", e)
        with h5py.File(root / f"part1/lid/{e}.hdf5", "w") as file:
            file["transforms/camera"] = np.zeros((20, 4, 4), np.float32)
            file.attrs.update(llm_type="reversible", llm_description="Put it on.", llm_description2="Take it off.",
                              which_llm_description=str(e + 1))  # fmt: skip
