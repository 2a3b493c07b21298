"""ManiSkill's trajectories, written in the layout of its RecordEpisode wrapper (versions 2 and 3)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data_tools.formats.maniskill import ManiskillReader, action_spec
from stamo_dist.errors import DataError

LENGTHS = (7, 50, 3)


def write(
    path: Path, mode: str = "pd_ee_delta_pose", images: str | None = "sensor_data", dim: int = 7, **kwargs: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    episodes = []
    with h5py.File(path, "w") as file:
        for k, length in enumerate(LENGTHS):
            group = file.create_group(f"traj_{k}", track_order=True)
            group["actions"] = rng.uniform(-1, 1, (length, dim)).astype(np.float32)
            group["terminated"], group["truncated"] = np.zeros(length, bool), np.zeros(length, bool)
            group["success"] = np.arange(length) == length - 1 if k != 2 else np.zeros(length, bool)
            group["env_states/articulations/panda"] = np.zeros((length + 1, 31), np.float32)
            if images:
                pose = np.concatenate(
                    [rng.normal(size=(length + 1, 3)), np.tile([0, 1, 0, 0], (length + 1, 1))], axis=1
                )
                group["obs/agent/qpos"] = rng.normal(size=(length + 1, 9)).astype(np.float32)
                group["obs/extra/tcp_pose"] = pose.astype(np.float32)
                pictures = np.arange(length + 1, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
                group.create_dataset(
                    f"obs/{images}/base_camera/rgb", data=pictures, compression="gzip", compression_opts=5
                )
            episodes.append(
                {
                    "episode_id": k,
                    "episode_seed": k + 100,
                    "control_mode": mode,
                    "elapsed_steps": length,
                    "reset_kwargs": {"options": {}, "seed": k + 100},
                    "success": k != 2,
                }
            )
    env = {"env_id": "PickCube-v1", "env_kwargs": {"obs_mode": "rgb", "control_mode": mode, **kwargs}}
    path.with_suffix(".json").write_text(json.dumps({"env_info": env, "episodes": episodes, "source_type": "rl"}))
    return path


def test_episodes(tmp_path: Path) -> None:
    path = write(tmp_path / "PickCube-v1" / "trajectory.rgb.pd_ee_delta_pose.physx_cpu.h5")
    write(tmp_path / "PickCube-v1" / "trajectory.h5", images=None)  # the original, without observations
    reader = ManiskillReader(tmp_path)
    scan = reader.scan()
    assert [e.length for e in scan.episodes] == list(LENGTHS)
    assert (scan.cameras, scan.rate_hz, scan.proprio_dim) == (["base_camera"], 20, 16)
    assert scan.options["files_without_pictures"] == ["PickCube-v1/trajectory.h5"]
    assert scan.files == [path, path.with_suffix(".json")]
    last = scan.episodes[2]
    assert (last.task, last.instruction, last.meta["success"]) == ("PickCube-v1", "", False)
    assert last.meta["reset_kwargs"]["seed"] == 102

    data = pickle.loads(pickle.dumps(reader)).read(scan.episodes[1])
    assert (data.actions.shape, data.proprio.shape, len(data.times)) == ((50, 7), (50, 16), 50)
    values = [int(frame[0, 0, 0]) for frame in data.frames["base_camera"]([0, 31, 32, 49])]
    assert values == [0, 31, 32, 49]
    assert data.pose is not None
    np.testing.assert_allclose(data.pose[:, 3:], [[np.pi, 0, 0]] * 50, atol=1e-6)  # w x y z = 0 1 0 0
    assert [e.key for e in ManiskillReader(tmp_path, success_only=True).scan().episodes] == ["traj_0", "traj_1"]


@pytest.mark.parametrize(
    ("mode", "robot", "dim", "version", "expected"),
    [
        ("pd_ee_delta_pose", "panda", 7, 3, ("delta", (3, 4, 5), -0.1, 6)),
        ("pd_ee_delta_pose", "panda_wristcam", 7, 2, ("delta", (3, 4, 5), 0.1, 6)),
        ("pd_ee_target_delta_pos", "panda", 4, 3, ("delta", (), -0.1, 3)),
        ("pd_joint_pos", "panda", 8, 3, ("other", (), 1.0, None)),
        ("pd_ee_delta_pose", "panda_stick", 6, 3, ("other", (), 1.0, None)),
        ("pd_ee_delta_pose", "widowx250s", 7, 3, ("other", (), 1.0, None)),
    ],
)
def test_controllers(mode: str, robot: str, dim: int, version: int, expected: tuple[Any, ...]) -> None:
    spec = action_spec(mode, robot, dim, version)
    assert (spec.mode, spec.rotation, spec.radians, spec.gripper) == expected


def test_version_2_and_its_rate(tmp_path: Path) -> None:
    scan = ManiskillReader(write(tmp_path / "trajectory.rgbd.h5", images="image", control_freq=10)).scan()
    assert scan.rate_hz == 10
    assert scan.action is not None
    assert scan.action.radians == 0.1


def test_faults_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with h5py.File(path, "a") as file:
        rgb = file["traj_0/obs/sensor_data/base_camera/rgb"][:-1]
        del file["traj_0/obs/sensor_data/base_camera/rgb"]
        file["traj_0/obs/sensor_data/base_camera/rgb"] = rgb
    scan = ManiskillReader(path).scan()
    assert [e.key for e in scan.episodes] == ["traj_1", "traj_2"]
    assert "observations of 7 actions must have 8 rows: obs/sensor_data/base_camera/rgb 7" in scan.bad[0]
    with pytest.raises(DataError, match="no camera hand_camera; it has base_camera"):
        ManiskillReader(path, cameras=["hand_camera"]).scan()

    cut = write(tmp_path / "cut.h5")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    write(tmp_path / "lonely.h5").with_suffix(".json").unlink()
    write(tmp_path / "joints.h5", mode="pd_joint_pos", dim=8)
    with pytest.raises(DataError) as error:
        ManiskillReader(tmp_path).scan()
    for text in ("cut.h5: not a whole HDF5 file", "lonely.json: missing", "actions differ"):
        assert text in str(error.value)


def retell(path: Path, env: dict[str, Any], **episode: Any) -> None:
    """Add to the JSON's env_info, and to each of its episodes."""
    told = json.loads(path.with_suffix(".json").read_text())
    told["env_info"] |= env
    told["episodes"] = [{**each, **episode} for each in told["episodes"]]
    path.with_suffix(".json").write_text(json.dumps(told))


def test_instructions_are_those_of_the_json_and_never_the_environments_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    for env, episode, text in (
        ({}, {}, ""),
        ({"language_instruction": "lift it"}, {}, "lift it"),
        ({}, {"instruction": "lift the cube"}, "lift the cube"),
    ):
        retell(path, env, **episode)
        scan = ManiskillReader(path).scan()
        assert {e.instruction for e in scan.episodes} == {text}
        assert bool(text) != any("3 of 3 episodes have none" in note for note in scan.notes)
    assert {e.instruction for e in ManiskillReader(path, instruction="push").scan().episodes} == {"push"}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    reader = ManiskillReader(path, image_orientation="rotated_180", proprio=["none"], only_successful=True)
    scan = reader.scan()
    assert [e.key for e in scan.episodes] == ["traj_0", "traj_1"]
    assert (scan.proprio_dim, reader.read(scan.episodes[0]).proprio.shape) == (0, (7, 0))
    with h5py.File(path, "a") as file:
        for k in range(3):
            del file[f"traj_{k}/obs/extra"], file[f"traj_{k}/obs/agent/qpos"]
            file[f"traj_{k}/obs/agent/joints"] = np.zeros((LENGTHS[k] + 1, 9))
    retell(path, env={"task_of_day": "lift"})
    said = "\n".join(ManiskillReader(path).scan().notes)
    for text in (
        "1 of 3 episodes failed, taken",
        "numeric ones are: agent/joints (9,)",
        "3 of 3 episodes have none; these look like one: env_info/task_of_day (--set instruction=TEXT",
    ):
        assert text in said
    with pytest.raises(DataError, match="image_orientation: 'over' must be one of upright"):
        ManiskillReader(path, image_orientation="over").scan()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"), [("env_kwargs", [1]), ("sim_config", "x"), ("control_freq", "fast"), ("info", 3)]
)
def test_metadata_faults_name_file_and_field(tmp_path: Path, key: str, value: Any) -> None:
    path = write(tmp_path / "a.h5")
    told = json.loads(path.with_suffix(".json").read_text())
    if key == "env_kwargs":
        told["env_info"][key] = value
    elif key == "info":
        for episode in told["episodes"]:
            episode[key] = value
    else:
        told["env_info"]["env_kwargs"][key] = value
    path.with_suffix(".json").write_text(json.dumps(told))
    if key == "info":  # `success` says it
        assert len(ManiskillReader(path).scan().episodes) == 3
        return
    with pytest.raises(DataError, match=rf"a\.json, .*{key}: "):
        ManiskillReader(path).scan()


def test_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures; replay it with --obs-mode rgb"):
        ManiskillReader(write(tmp_path / "trajectory.h5", images=None)).scan()
