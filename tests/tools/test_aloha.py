"""ALOHA's HDF5, in the layout that ACT's record_sim_episodes.py and ALOHA's record_episodes.py write."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest
import simplejpeg

from data_tools.convert.driver import convert
from data_tools.formats.aloha import AlohaReader
from data_tools.images import decode
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError

LENGTH = 12


def frames(seed: int) -> np.ndarray:
    """Frame t is grey with the value 20 t on the left and blue on the right."""
    images = np.zeros((LENGTH, 16, 24, 3), np.uint8)
    images[:, :, :12] = (20 * np.arange(LENGTH) + seed)[:, None, None, None]
    images[:, :, 12:, 2] = 255
    return images


def write(path: Path, pictures: Literal["raw", "padded", "variable"] = "raw", seed: int = 0, **attrs: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file.attrs.update(sim=pictures == "raw", compress=pictures != "raw", **attrs)
        file["action"], file["observations/qpos"] = rng.normal(size=(LENGTH, 14)), rng.normal(size=(LENGTH, 14))
        file["observations/qvel"] = np.zeros((LENGTH, 14))
        for camera in ("cam_high", "cam_left_wrist"):
            images = frames(seed)
            name = f"observations/images/{camera}"
            if pictures == "raw":
                file.create_dataset(name, data=images, chunks=(1, 16, 24, 3))
                continue
            encoded = [np.frombuffer(simplejpeg.encode_jpeg(i, 95, "RGB", "444"), np.uint8) for i in images]
            if pictures == "variable":
                file.create_dataset(name, (LENGTH,), h5py.vlen_dtype(np.uint8))[:] = encoded
                continue
            longest = max(map(len, encoded)) + 7
            file[name] = np.stack([np.pad(row, (0, longest - len(row))) for row in encoded])
            if "compress_len" not in file:
                file["compress_len"] = np.tile([len(row) for row in encoded], (2, 1)).astype(float)
    return path


@pytest.mark.parametrize("pictures", ["raw", "padded", "variable"])
def test_episodes(tmp_path: Path, pictures: Literal["raw", "padded", "variable"]) -> None:
    for k in range(2):
        path = write(tmp_path / "transfer_cube" / f"episode_{k}.hdf5", pictures, seed=k)
    reader = AlohaReader(tmp_path)
    scan = reader.scan()
    assert [(e.id, e.length, e.task) for e in scan.episodes] == [
        (f"transfer_cube/episode_{k}", LENGTH, "transfer_cube") for k in range(2)
    ]
    assert (scan.cameras, scan.rate_hz, scan.proprio_dim) == (["cam_high", "cam_left_wrist"], 50, 14)
    assert scan.action is not None
    assert (scan.action.dim, scan.action.mode, "(dimension 6)" in scan.action.text) == (14, "other", True)
    assert [note.split(":")[0] for note in scan.notes] == ["instructions", "rate"]
    data = pickle.loads(pickle.dumps(reader)).read(scan.episodes[1])
    with h5py.File(path) as file:
        np.testing.assert_array_equal(data.actions, file["action"][:])
        np.testing.assert_array_equal(data.proprio, file["observations/qpos"][:])
    found = [f if isinstance(f, np.ndarray) else decode(f) for f in data.frames["cam_high"]([0, 5, 11])]
    np.testing.assert_allclose(np.stack(found).astype(int), frames(1)[[0, 5, 11]], atol=6)
    np.testing.assert_allclose(np.diff(data.times), 0.02)


def test_colours_and_orientation(tmp_path: Path) -> None:
    path = write(tmp_path / "episode_0.hdf5", "padded")
    reader = AlohaReader(path, channels="bgr", image_orientation="mirrored", rate_hz=30)
    scan = reader.scan()
    (frame,) = reader.read(scan.episodes[0]).frames["cam_high"]([3])
    assert isinstance(frame, np.ndarray)
    np.testing.assert_allclose(frame.astype(int), frames(0)[3][:, ::-1, ::-1], atol=6)
    assert scan.rate_hz == 30


def test_instructions_success_and_base(tmp_path: Path) -> None:
    own = ["reach"] * 4 + ["lift"] * 8
    write(tmp_path / "a.hdf5", language_instruction="lift it", success=True)
    with h5py.File(write(tmp_path / "b.hdf5", success=False), "a") as file:
        file["language_raw"] = own
    with h5py.File(write(tmp_path / "c.hdf5", goal_words="put"), "a") as file:
        file["base_action"] = np.zeros((LENGTH, 2))
    reader = AlohaReader(tmp_path)
    scan = reader.scan()
    assert [e.instruction for e in scan.episodes] == ["lift it", "reach", ""]
    assert [reader.read(e).instructions for e in scan.episodes] == [None, own, None]
    said = "\n".join(scan.notes)
    for text in ("1 of 3 episodes failed", "1 of 3 episodes have none; these look like one: goal_words", "base_action"):
        assert text in said
    assert [e.id for e in AlohaReader(tmp_path, only_successful=True).scan().episodes] == ["a", "c"]
    mobile = AlohaReader(tmp_path / "c.hdf5", action=["action", "base_action"], proprio=["none"])
    scan = mobile.scan()
    assert scan.action is not None
    assert (scan.action.dim, scan.proprio_dim) == (16, 0)
    assert mobile.read(scan.episodes[0]).actions.shape == (LENGTH, 16)


def test_faults_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.hdf5")
    for options, name in (
        ({"action": ["acton"]}, "acton"),
        ({"proprio": ["qpos"]}, "qpos"),
        ({"cameras": ["top"]}, "observations/images/top"),
    ):
        with pytest.raises(DataError, match=rf"a: no {name}; it has action float64 \(12, 14\), .*cam_high"):
            AlohaReader(path, **options).scan()  # type: ignore[arg-type]
    with h5py.File(write(tmp_path / "b.hdf5"), "a") as file:
        del file["action"]
        file["action"] = np.zeros((LENGTH - 1, 14))
    write(tmp_path / "c.hdf5").write_bytes(b"no")
    scan = AlohaReader(tmp_path).scan()
    assert [e.id for e in scan.episodes] == ["a"]
    assert "b: lengths differ: action 11, observations/qpos 12" in scan.bad[0]
    assert "not a whole HDF5 file" in scan.bad[1]


def test_into_shards(tmp_path: Path) -> None:
    write(tmp_path / "in" / "episode_0.hdf5", "padded", language_instruction="lift it")
    manifest, _ = convert("aloha", tmp_path / "in", tmp_path / "out", size=16, val_fraction=0, quiet=True)
    assert (manifest.action_dim, manifest.proprio_dim, manifest.rate_hz) == (14, 14, 50)
    (episode,) = read_episodes(tmp_path / "out", "train")
    assert (episode.length, episode.instruction) == (LENGTH, "lift it")
