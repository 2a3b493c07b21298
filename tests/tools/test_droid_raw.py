"""DROID's raw episodes. The data is not at hand here: these files have its layout and names, with a real mp4."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stamo_dist.errors import DataError

av = pytest.importorskip("av", reason="needs the [convert] extra: pip install -e '.[convert]'")

from data_tools.formats.droid_raw import DroidRawReader  # noqa: E402

STEPS = 20
SERIALS = {"ext1": "22008760", "ext2": "24400334", "wrist": "18026681"}
UUID = "AUTOLab+84bd5053+2023-07-07-09h-42m-23s"
PAUSED = (0, 1, 12)


def video(path: Path, shades: list[int], width: int = 64, height: int = 36) -> None:
    """Grey frames; the right half is black where the picture is a stereo one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=60)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for shade in shades:
            picture = np.full((height, width, 3), shade, np.uint8)
            if width > 2.5 * height:
                picture[:, width // 2 :] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write(root: Path, outcome: str = "success", name: str = "Fri_Jul__7_09:42:23_2023", **changes: Any) -> Path:
    """LAB/OUTCOME/DATE/NAME; `changes` go into the metadata."""
    folder = root / "AUTOLab" / outcome / "2023-07-07" / name
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    start = 1688748143000
    capture = start + np.cumsum(rng.integers(60, 75, STEPS))
    with h5py.File(folder / "trajectory.h5", "w") as file:
        file.attrs["current_task"], file.attrs["success"] = "Move object", outcome == "success"
        for group in ("action", "observation/robot_state"):
            pose = rng.uniform(-1, 1, (STEPS, 6))
            pose[:, 3:] = [0, 0, np.pi / 2]
            file[f"{group}/cartesian_position"] = pose
            file[f"{group}/gripper_position"] = rng.uniform(size=STEPS)
        file["action/joint_position"] = rng.normal(size=(STEPS, 7))
        file["action/cartesian_velocity"] = rng.normal(size=(STEPS, 6))
        file["observation/robot_state/joint_positions"] = rng.normal(size=(STEPS, 7))
        file["observation/timestamp/skip_action"] = np.isin(np.arange(STEPS), PAUSED)
        file["observation/timestamp/control/step_start"] = start + np.arange(STEPS) * 66
        for camera, serial in SERIALS.items():
            file[f"observation/timestamp/cameras/{serial}_estimated_capture"] = capture
            file[f"observation/camera_type/{serial}"] = np.full(STEPS, 0 if camera == "wrist" else 1)
    shades = [10 + 10 * t for t in range(STEPS)] + [250]  # the recording is stopped a frame later
    video(folder / "recordings/MP4" / f"{SERIALS['ext1']}.mp4", shades)
    video(folder / "recordings/MP4" / f"{SERIALS['ext2']}-stereo.mp4", shades, width=128)
    video(folder / "recordings/MP4" / f"{SERIALS['wrist']}.mp4", shades)
    meta = {
        "uuid": UUID if outcome == "success" else "other",
        "lab": "AUTOLab",
        "success": outcome == "success",
        "current_task": "Move object",
        "trajectory_length": STEPS,
        "hdf5_path": "success/…/trajectory.h5",
        "ext1_cam_extrinsics": [0.1] * 6,
        **{f"{camera}_cam_serial": serial for camera, serial in SERIALS.items()},
        **changes,
    }
    (folder / f"metadata_{UUID}.json").write_text(json.dumps(meta))
    return folder


def test_episode(tmp_path: Path) -> None:
    """Steps are frames; paused steps drop out; times are the camera's own; the left half of stereo pictures."""
    folder = write(tmp_path)
    said = {UUID: {"language_instruction1": "", "language_instruction2": "Put the marker in the cup"}}
    (tmp_path / "aggregated-annotations-030724.json").write_text(json.dumps(said))
    reader = DroidRawReader(tmp_path)
    scan = reader.scan()
    (episode,) = scan.episodes
    assert (scan.cameras, scan.rate_hz, scan.proprio_dim) == (["ext1", "ext2", "wrist"], 15, 14)
    assert (episode.id, episode.length) == (folder.relative_to(tmp_path).as_posix(), STEPS)
    assert (episode.task, episode.instruction) == ("Move object", "Put the marker in the cup")
    assert episode.meta["success"] is True
    assert "hdf5_path" not in episode.meta
    spec = scan.action
    assert spec is not None
    assert (spec.mode, spec.rotation_kind, spec.gripper, spec.gripper_open) == ("absolute", "euler_xyz", 6, 0)

    data = pickle.loads(pickle.dumps(reader)).read(episode)
    kept = [t for t in range(STEPS) if t not in PAUSED]
    with h5py.File(folder / "trajectory.h5") as file:
        np.testing.assert_array_equal(data.actions[:, :6], file["action/cartesian_position"][kept])
        np.testing.assert_array_equal(data.actions[:, 6], file["action/gripper_position"][kept])
        capture = file[f"observation/timestamp/cameras/{SERIALS['ext1']}_estimated_capture"][:]
        np.testing.assert_allclose(np.diff(data.times), np.diff(capture[kept]) / 1000, atol=1e-9)
    assert data.pose is not None
    np.testing.assert_allclose(data.pose[:, 3:], [[0, 0, np.pi / 2]] * len(kept), atol=1e-9)
    for camera in ("ext1", "ext2", "wrist"):
        for frame, t in zip(data.frames[camera]([0, 9, 16]), (kept[0], kept[9], kept[16]), strict=True):
            assert isinstance(frame, np.ndarray)
            assert frame.shape == (36, 64, 3)
            assert np.abs(frame.astype(int) - (10 + 10 * t)).max() <= 4

    assert len(DroidRawReader(tmp_path, skipped="keep").read(episode).actions) == STEPS
    joints = DroidRawReader(tmp_path, action="joint_position")
    assert joints.read(joints.scan().episodes[0]).actions.shape == (len(kept), 8)


def test_outcome_and_missing_metadata(tmp_path: Path) -> None:
    """Without metadata_*.json the cameras are those of trajectory.h5: type 0 is the wrist, the others by serial."""
    folder = write(tmp_path)
    write(tmp_path, "failure", "Fri_Jul__7_10:00:00_2023")
    next(folder.glob("metadata_*")).unlink()
    scan = DroidRawReader(tmp_path).scan()
    assert [e.meta["success"] for e in scan.episodes] == [False, True]
    assert [e.length for e in scan.episodes] == [STEPS, STEPS]
    assert scan.episodes[1].private == scan.episodes[0].private
    assert len(DroidRawReader(tmp_path, success_only=True).scan().episodes) == 1
    assert len(DroidRawReader(tmp_path, only_successful=True).scan().episodes) == 1
    assert any("1 of 2 episodes failed, taken" in note for note in DroidRawReader(tmp_path).scan().notes)


def test_broken_episodes(tmp_path: Path) -> None:
    """A missing recording is found by the scan; truncated files and too short recordings when they are read."""
    missing, cut, short, film = (write(tmp_path, name=f"episode_{k}") for k in range(4))
    (missing / "recordings/MP4" / f"{SERIALS['wrist']}.mp4").unlink()
    path = cut / "trajectory.h5"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video(short / "recordings/MP4" / f"{SERIALS['ext1']}.mp4", [0] * (STEPS - 5))
    path = film / "recordings/MP4" / f"{SERIALS['ext1']}.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    reader = DroidRawReader(tmp_path)
    scan = reader.scan()
    assert len(scan.bad) == 1
    assert f"no recordings/MP4/{SERIALS['wrist']}.mp4 (wrist); there is" in scan.bad[0]
    for episode, reason in zip(
        scan.episodes, (r"trajectory\.h5: not a whole HDF5 file", "ext1: 15 frames for 20 steps", r"\.mp4"), strict=True
    ):
        with pytest.raises(DataError, match=reason):
            reader.read(episode)


def test_wrong_source_and_options(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no trajectory\.h5"):
        DroidRawReader(tmp_path).scan()
    with pytest.raises(DataError) as error:
        DroidRawReader(tmp_path, cameras=["front"], annotations=tmp_path / "no.json").scan()
    assert "cameras: no 'front'; there are ext1, ext2, wrist" in str(error.value)
    assert "no.json: no such file" in str(error.value)
