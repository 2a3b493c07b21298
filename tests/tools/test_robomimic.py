"""robomimic's HDF5 layout, as its documentation and robosuite's controllers define it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data_tools.convert.driver import convert
from data_tools.convert.episode import Processing, read_episode
from data_tools.formats.robomimic import RobomimicReader
from stamo_dist.errors import DataError

OSC = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "control_delta": True,
}
LENGTHS = (40, 12, 9)


def env_args(controller: dict[str, Any] = OSC, **kwargs: Any) -> dict[str, Any]:
    return {
        "env_name": "PickPlaceCan",
        "type": 1,
        "env_version": "1.4.1",
        "env_kwargs": {"robots": ["Panda"], "control_freq": 20, "controller_configs": controller, **kwargs},
    }


def frames(length: int) -> np.ndarray:
    """Numbered: the top half of frame t has the value t, the bottom half 255."""
    images = np.full((length, 12, 12, 3), 255, np.uint8)
    images[:, :6] = np.arange(length, dtype=np.uint8)[:, None, None, None]
    return images


def write(path: Path, env: dict[str, Any] | None = None, scale: float = 1.0, actions: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(LENGTHS)
        data.attrs["env_args"] = json.dumps(env or env_args())
        for k, length in enumerate(LENGTHS):
            demo = data.create_group(f"demo_{k}")
            demo.attrs["num_samples"] = length
            demo["actions"] = rng.uniform(-scale, scale, (length, actions))
            demo["states"] = rng.normal(size=(length, 20))
            demo["rewards"], demo["dones"] = np.zeros(length), np.zeros(length)
            for group in ("obs", "next_obs"):
                demo[f"{group}/robot0_eef_pos"] = rng.normal(size=(length, 3))
                demo[f"{group}/robot0_eef_quat"] = np.tile([0, 0, np.sqrt(0.5), np.sqrt(0.5)], (length, 1))
                demo[f"{group}/robot0_gripper_qpos"] = rng.normal(size=(length, 2))
                demo[f"{group}/object"] = rng.normal(size=(length, 14))
                for camera in ("agentview", "robot0_eye_in_hand"):
                    images = frames(length) if group == "obs" else frames(length)[::-1]
                    demo.create_dataset(
                        f"{group}/{camera}_image", data=images, compression="gzip", chunks=(5, 12, 12, 3)
                    )
        file["mask/train"] = np.array([b"demo_0", b"demo_2"])
        file["mask/valid"] = np.array([b"demo_1"])
    return path


def test_episodes(tmp_path: Path) -> None:
    path = write(tmp_path / "can" / "image.hdf5")
    reader = RobomimicReader(tmp_path)
    scan = reader.scan()
    assert [(e.id, e.length, e.split) for e in scan.episodes] == [
        ("can/image/demo_0", 40, "train"),
        ("can/image/demo_1", 12, "val"),
        ("can/image/demo_2", 9, "train"),
    ]
    assert (scan.cameras, scan.rate_hz, scan.proprio_dim) == (["agentview", "robot0_eye_in_hand"], 20, 9)
    assert (scan.episodes[0].task, scan.episodes[0].instruction) == ("PickPlaceCan", "")  # nothing made up, but said
    assert scan.notes == [
        "instructions: 3 of 3 episodes have none; give them with --instructions FILE.csv (columns episode,instruction)"
    ]
    spec = scan.action
    assert spec is not None
    assert (spec.mode, spec.metres, spec.radians, spec.rotation) == ("delta", 0.05, 0.5, (3, 4, 5))
    assert (spec.gripper, spec.gripper_open, spec.gripper_closed) == (6, -1, 1)

    data = pickle.loads(pickle.dumps(reader)).read(scan.episodes[0])
    with h5py.File(path) as file:
        np.testing.assert_array_equal(data.actions, file["data/demo_0/actions"][:])
        np.testing.assert_array_equal(data.proprio[:, :3], file["data/demo_0/obs/robot0_eef_pos"][:])
    assert data.pose is not None
    np.testing.assert_allclose(data.pose[:, 3:], [[0, 0, np.pi / 2]] * 40, atol=1e-12)
    wanted = [0, 3, 4, 33, 39]
    found = list(data.frames["agentview"](wanted))
    np.testing.assert_array_equal(np.stack(found), frames(40)[wanted])  # upright, and of obs, not next_obs
    np.testing.assert_allclose(np.diff(data.times), 0.05)


def test_absolute_poses_that_call_themselves_deltas(tmp_path: Path) -> None:
    """Diffusion Policy's *_abs.hdf5 keep control_delta true; poses in metres and radians exceed ±1."""
    path = write(tmp_path / "image_abs.hdf5", scale=3.0)
    with pytest.raises(DataError, match=r"image_abs\.hdf5.*beyond the ±1.*action=absolute"):
        RobomimicReader(path).scan()
    spec = RobomimicReader(path, action="absolute").scan().action
    assert spec is not None
    assert (spec.mode, spec.metres, spec.radians) == ("absolute", 1, 1)


@pytest.mark.parametrize(
    ("controller", "dim", "mode", "gripper"),
    [
        ({"type": "BASIC", "body_parts": {"right": {**OSC, "input_type": "delta"}}}, 7, "delta", 6),
        ({**OSC, "control_delta": False}, 7, "absolute", 6),
        ({"type": "OSC_POSITION", "output_max": [0.05] * 3}, 4, "delta", 3),
        ({"type": "JOINT_VELOCITY"}, 8, "other", None),
        ([OSC, OSC], 14, "other", None),  # two arms
    ],
)
def test_controllers(tmp_path: Path, controller: Any, dim: int, mode: str, gripper: int | None) -> None:
    path = write(tmp_path / "a.hdf5", env_args(controller), actions=dim)
    spec = RobomimicReader(path).scan().action
    assert spec is not None
    assert (spec.dim, spec.mode, spec.gripper) == (dim, mode, gripper)


def test_rate_must_be_known(tmp_path: Path) -> None:
    path = write(tmp_path / "real.hdf5", {"env_name": "lift", "type": 3, "env_kwargs": {}})
    with pytest.raises(DataError, match=r"real\.hdf5.*rate_hz"):
        RobomimicReader(path).scan()
    assert RobomimicReader(path, rate_hz=15).scan().rate_hz == 15


def test_every_fault_is_named(tmp_path: Path) -> None:
    """A truncated file, a file of another rate, an episode without a camera, one of another length."""
    whole = write(tmp_path / "whole.hdf5")
    with h5py.File(whole, "a") as file:
        del file["data/demo_1/obs/agentview_image"]
        del file["data/demo_2/actions"]
        file["data/demo_2/actions"] = np.zeros((4, 7))
    scan = RobomimicReader(whole, cameras=["agentview"]).scan()
    assert [e.key for e in scan.episodes] == ["demo_0"]
    assert "no agentview_image" in scan.bad[0] or "no agentview" in scan.bad[0]
    assert "robot0_eye_in_hand_image uint8 (12, 12, 12, 3)" in scan.bad[0]
    assert "actions 4, obs/agentview_image 9" in scan.bad[1]

    cut = write(tmp_path / "cut.hdf5")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    write(tmp_path / "slow.hdf5", env_args(control_freq=10))
    with pytest.raises(DataError) as error:
        RobomimicReader(tmp_path).scan()
    assert "cut.hdf5: not a whole HDF5 file" in str(error.value)
    assert "rates in Hz differ" in str(error.value)


def test_grey_pictures(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        for k, length in enumerate(LENGTHS):
            del file[f"data/demo_{k}/obs/agentview_image"]
            file[f"data/demo_{k}/obs/agentview_image"] = np.zeros((length, 12, 12, 1), np.float32)
    with pytest.raises(DataError, match=r"agentview_image is float32 \(40, 12, 12, 1\), not uint8 RGB"):
        RobomimicReader(path).scan()


def spoken(path: Path, where: str, name: str, value: Any) -> list[str]:
    """The instructions of a file that says them in one more place."""
    write(path)
    with h5py.File(path, "a") as file:
        groups = [file[where]] if where != "demo" else [file[f"data/demo_{k}"] for k in range(3)]
        for group in groups:
            group.attrs[name] = value
    return [e.instruction for e in RobomimicReader(path).scan().episodes]


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("demo", "ep_meta", json.dumps({"lang": "lift"})),
        ("demo", "task_description", "lift"),
        ("demo", "lang", np.bytes_(b"lift ")),
        ("data", "language_instruction", "lift"),
        ("data", "env_args", json.dumps({**env_args(), "env_lang": "lift"})),
    ],
)
def test_instructions(tmp_path: Path, where: str, name: str, value: Any) -> None:
    assert spoken(tmp_path / "a.hdf5", where, name, value) == ["lift"] * 3


def test_instruction_of_each_step_and_unusual_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5")
    own = ["open it"] * 5 + ["close it"] * 7
    with h5py.File(path, "a") as file:
        file["data/demo_1/obs/language_instruction"] = own
        file["data/demo_2"].attrs["goal_words"] = "lift"
    reader = RobomimicReader(path)
    scan = reader.scan()
    assert [e.instruction for e in scan.episodes] == ["", "open it", ""]
    assert reader.read(scan.episodes[1]).instructions == own
    assert any("2 of 3 episodes have none" in n and "/data/demo_2/goal_words" in n for n in scan.notes)


def test_failures_proprio_and_orientation(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        for k in range(3):
            file[f"data/demo_{k}"].attrs["success"] = k != 1
            for key in ("eef_pos", "eef_quat", "gripper_qpos"):
                file.move(f"data/demo_{k}/obs/robot0_{key}", f"data/demo_{k}/obs/{key}")
    scan = RobomimicReader(path).scan()
    assert (len(scan.episodes), scan.proprio_dim) == (3, 0)
    assert any("1 of 3 episodes failed, taken" in note for note in scan.notes)
    assert any(note.startswith("proprio: none") and "eef_pos (3,)" in note for note in scan.notes)

    reader = RobomimicReader(
        path,
        proprio=["eef_pos", "gripper_qpos"],
        pose=["eef_pos", "eef_quat"],
        pose_rotation="quat_wxyz",
        image_orientation="flipped_vertically",
        only_successful=True,
    )
    scan = reader.scan()
    assert [e.key for e in scan.episodes] == ["demo_0", "demo_2"]
    assert scan.proprio_dim == 5
    data = reader.read(scan.episodes[0])
    assert data.pose is not None
    # (w x y z) = (0 0 √½ √½): half a turn about the axis between y and z.
    np.testing.assert_allclose(np.abs(data.pose[:, 3:]), [[0, np.pi / 2**0.5, np.pi / 2**0.5]] * 40)
    np.testing.assert_array_equal(next(iter(data.frames["agentview"]([7]))), frames(40)[7][::-1])
    assert not any("proprio" in note for note in RobomimicReader(path, proprio=["none"]).scan().notes)


def test_mobile_arm_is_declared(tmp_path: Path) -> None:
    """RoboCasa: arm, gripper and a mobile base, 12 dimensions; the arm's become a motion, all stay as they were too."""
    path = write(tmp_path / "a.hdf5", actions=12)
    undeclared = RobomimicReader(path).scan()
    assert undeclared.action is not None
    assert (undeclared.action.mode, undeclared.action.gripper) == ("other", None)
    assert any("gripper_dim" in note for note in undeclared.notes)
    how: dict[str, Any] = {"action": "delta", "rotation": "rotvec", "metres": 0.05, "radians": 0.5, "gripper": "-1,1"}
    reader = RobomimicReader(path, **how, gripper_dim=6)
    scan = reader.scan()
    assert any("last 5 of 12 dimensions" in note for note in scan.notes)
    converted = read_episode(
        reader, scan.episodes[0], Processing(16), cameras=scan.cameras, spec=scan.action, proprio_dim=scan.proprio_dim
    )
    with h5py.File(path) as file:
        actions = file["data/demo_0/actions"][:]
    np.testing.assert_array_equal(converted.vectors["original_action"], actions.astype(np.float32))
    assert converted.vectors["action"].shape == (40, 7)
    np.testing.assert_allclose(
        converted.vectors["action"][:, :6], actions[:, :6] * [*[0.05] * 3, *[0.5] * 3], atol=1e-6
    )
    np.testing.assert_allclose(converted.vectors["action"][:, 6], (1 - actions[:, 6]) / 2, atol=1e-6)
    with pytest.raises(DataError, match=r"12 dimensions; x y z, rotation \(rotvec\), gripper would be 7"):
        RobomimicReader(path, **how).scan()
    with pytest.raises(DataError, match="also needs rotation"):
        RobomimicReader(path, action="delta", gripper="-1,1").scan()


def test_asked_for_and_absent(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5")
    for options in ({"action_keys": ["acton"]}, {"proprio": ["eef"]}, {"cameras": ["top"]}, {"pose": ["eef"]}):
        missing = next(iter(options.values()))[0]
        with pytest.raises(DataError, match=rf"a\.hdf5: .*no {missing}.*; it has .*robot0_eef_pos float64"):
            RobomimicReader(path, **options).scan()


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ("data", "env_args", "{", "/data: attribute env_args: not JSON"),
        ("data", "env_args", "[1]", "/data: attribute env_args: must be a JSON object, not "),
        (
            "data",
            "env_args",
            '{"env_kwargs": 3}',
            "/data: attribute env_args, env_kwargs: must be a JSON object, not 3",
        ),
        ("data", "env_args", json.dumps(env_args(control_freq="x")), "control_freq: must be a positive number .*'x'"),
        ("data", "env_args", json.dumps(env_args("OSC")), "controller_configs 'OSC' is no"),  # type: ignore[arg-type]
        (
            "data",
            "env_args",
            json.dumps(env_args({**OSC, "output_max": "x"})),
            "output_max 'x' are no 6 positive numbers",
        ),
        ("demo", "ep_meta", "{", "/data/demo_0: attribute ep_meta: not JSON"),
    ],
)
def test_metadata_faults_name_file_and_field(tmp_path: Path, where: str, name: str, value: str, message: str) -> None:
    with pytest.raises(DataError, match=r"a\.hdf5: .*" + message) as error:
        spoken(tmp_path / "a.hdf5", where, name, value)
    assert "\n" not in str(error.value)


def test_a_dataset_s_own_split_that_cannot_be_read_is_said_to_be_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "raw/image.hdf5")
    with h5py.File(path, "r+") as file:
        file["data/demo_1/actions"][2] = np.nan
    manifest, _ = convert("robomimic", path, tmp_path / "out", size=12, split_by="source", quiet=True, max_bad=2)
    assert set(manifest.splits) == {"train"}
    assert "split val: none of the 1 episodes chosen could be read" in manifest.notes
