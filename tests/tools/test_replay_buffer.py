"""ReplayBuffers as Diffusion Policy's and UMI's own class lays them out (zarr format 2, Blosc)."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.convert.driver import convert
from data_tools.formats.registry import parse_options
from data_tools.formats.replay_buffer import UMI_HOW, ReplayBufferReader
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError
from stamo_dist.extras import how_to_install

zarr = pytest.importorskip("zarr", reason="needs the [zarr] extra: pip install -e '.[zarr]'")

ENDS = (7, 50, 60)


def store(group: Any, key: str, values: np.ndarray, chunk: int = 16, **how: Any) -> None:
    shape = (min(chunk, len(values)), *values.shape[1:])
    make = group.create_array if hasattr(group, "create_array") else group.create_dataset
    make(key, shape=values.shape, chunks=shape, dtype=values.dtype, **how)[:] = values


def pictures(rows: int) -> np.ndarray:
    """Row t is grey with the value t + 1, its top half white."""
    images = np.full((rows, 8, 10, 3), 255, np.uint8)
    images[:, 4:] = np.arange(1, rows + 1, dtype=np.uint8)[:, None, None, None]
    return images


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ENDS[-1], *shape)).astype(np.float32)


def write(path: Path, data: dict[str, np.ndarray], ends: Any = ENDS) -> Path:
    version = {"zarr_format": 2} if zarr.__version__ >= "3" else {}
    group = zarr.open_group(str(path), mode="w", **version)
    for key, rows in data.items():
        store(group, f"data/{key}", rows)
    store(group, "meta/episode_ends", np.asarray(ends))
    return path


def pusht(path: Path, **more: np.ndarray) -> Path:
    """As Push-T: pictures as floats of 0 to 255."""
    rows = {"img": pictures(ENDS[-1]).astype(np.float32), "state": values(1, 5), "action": values(2, 2)}
    return write(path, rows | {"n_contacts": values(3, 1)} | more)


def umi(path: Path) -> Path:
    rows = {
        "camera0_rgb": pictures(ENDS[-1]),
        "robot0_eef_pos": values(1, 3),
        "robot0_eef_rot_axis_angle": values(2, 3) * 0.1,
        "robot0_gripper_width": np.abs(values(3, 1)) * 0.02,
        "robot0_demo_start_pose": values(4, 6),
    }
    return write(path, rows)


def zipped(path: Path) -> Path:
    shutil.make_archive(str(path), "zip", path)
    return path.with_name(path.name + ".zip")


@pytest.mark.parametrize("pack", [lambda p: p, zipped])
def test_diffusion_policy(tmp_path: Path, pack: Any) -> None:
    reader = ReplayBufferReader(pack(pusht(tmp_path / "pusht.zarr")), rate_hz=10)
    scan = reader.scan()
    assert [(e.id, e.length) for e in scan.episodes] == [
        ("pusht/episode_000000", 7),
        ("pusht/episode_000001", 43),
        ("pusht/episode_000002", 10),
    ]
    assert (scan.cameras, scan.rate_hz, scan.proprio_dim) == (["img"], 10, 5)
    assert scan.action is not None
    assert (scan.action.dim, scan.action.mode, bool(scan.action.unstated)) == (2, "other", True)
    said = "\n".join(scan.notes)
    for text in ("img is stored as floats, read as 0 to 255", "3 of 3 episodes have none", "--set mode=other"):
        assert text in said
    data = pickle.loads(pickle.dumps(reader)).read(scan.episodes[1])
    np.testing.assert_array_equal(data.actions, values(2, 2)[7:50])
    np.testing.assert_array_equal(data.proprio, values(1, 5)[7:50])
    wanted = [0, 8, 9, 41, 42]
    np.testing.assert_array_equal(np.stack(list(data.frames["img"](wanted))), pictures(60)[7:50][wanted])


def test_pictures_of_0_to_1_and_orientation(tmp_path: Path) -> None:
    path = pusht(tmp_path / "a.zarr", img=(pictures(60) / 255).astype(np.float32))
    reader = ReplayBufferReader(path, rate_hz=10, image_orientation="flipped_vertically")
    (frame,) = reader.read(reader.scan().episodes[0]).frames["img"]([3])
    np.testing.assert_array_equal(frame, pictures(60)[3][::-1])


def test_umi(tmp_path: Path) -> None:
    """Without a key `action` there are none, and it is said how; then the next pose is the action."""
    path = umi(tmp_path / "cup.zarr")
    scan = ReplayBufferReader(path, rate_hz=60).scan()
    assert (scan.action, scan.proprio_dim) == (None, 7)
    assert any(UMI_HOW in note for note in scan.notes)
    options = parse_options("zarr", UMI_HOW.split()[1::2])
    reader = ReplayBufferReader(path, rate_hz=60, **options)
    scan = reader.scan()
    assert [e.length for e in scan.episodes] == [6, 42, 9]
    spec = scan.action
    assert spec is not None
    assert (spec.mode, spec.rotation_kind, spec.gripper, spec.gripper_open) == ("absolute", "rotvec", 6, 0.08)
    data = reader.read(scan.episodes[1])
    np.testing.assert_array_equal(data.actions[:, :3], values(1, 3)[8:50])
    assert data.pose is not None
    np.testing.assert_allclose(data.pose[:, :3], values(1, 3)[7:49])
    np.testing.assert_allclose(data.pose[:, 3:], values(2, 3)[7:49] * 0.1, atol=1e-6)
    options |= {"instruction": "move the cup", "rate_hz": 60}
    manifest, _ = convert("zarr", path, tmp_path / "out", size=16, val_fraction=0, quiet=True, options=options)
    assert (manifest.action_dim, manifest.splits["train"].frames) == (7, 57)
    assert read_episodes(tmp_path / "out", "train")[0].instruction == "move the cup"


def test_times_of_a_real_robot(tmp_path: Path) -> None:
    stamps = 1e9 + np.arange(ENDS[-1]) * 0.1
    reader = ReplayBufferReader(pusht(tmp_path / "a.zarr", timestamp=stamps))
    scan = reader.scan()
    assert scan.rate_hz == 10
    np.testing.assert_allclose(reader.read(scan.episodes[2]).times, np.arange(10) * 0.1, atol=1e-6)
    with pytest.raises(DataError, match=r"b\.zarr: no data/timestamp; .*--set rate_hz=HZ"):
        ReplayBufferReader(pusht(tmp_path / "b.zarr")).scan()


def test_faults_are_named(tmp_path: Path) -> None:
    path = pusht(tmp_path / "a.zarr")
    for options, missing in (
        ({"action": ["acton"]}, "acton"),
        ({"proprio": ["q"]}, "q"),
        ({"cameras": ["top"]}, "top"),
    ):
        with pytest.raises(DataError, match=rf"a\.zarr: data has no {missing}; it has action float32 \(60, 2\), img"):
            ReplayBufferReader(path, rate_hz=10, **options).scan()  # type: ignore[arg-type]
    with pytest.raises(DataError, match="mode: delta also needs rotation and gripper"):
        ReplayBufferReader(path, rate_hz=10, mode="delta").scan()
    with pytest.raises(DataError, match="episode_ends must be increasing whole numbers"):
        ReplayBufferReader(write(tmp_path / "b.zarr", {"img": pictures(9)}, [5, 5, 9]), rate_hz=10).scan()
    with pytest.raises(DataError, match="data/img has 9 rows; meta/episode_ends needs 12"):
        ReplayBufferReader(write(tmp_path / "c.zarr", {"img": pictures(9)}, [5, 12]), rate_hz=10).scan()
    (tmp_path / "d.zarr.zip").write_bytes(b"no")
    with pytest.raises(DataError, match=r"d\.zarr\.zip: cannot be read as a zarr ReplayBuffer"):
        ReplayBufferReader(tmp_path / "d.zarr.zip", rate_hz=10).scan()
    next((path / "data" / "img").glob("[0-9]*")).unlink()
    assert any("1 chunks of img are not stored" in n for n in ReplayBufferReader(path, rate_hz=10).scan().notes)


@pytest.mark.parametrize(
    ("id", "message"),
    [("pickle", "pickle"), ("jxr", f"codec not available: .*{re.escape(how_to_install('zarr'))}")],
)
def test_codecs_that_are_not_read(tmp_path: Path, id: str, message: str) -> None:
    path = pusht(tmp_path / "a.zarr")
    about = json.loads((path / "data/action/.zarray").read_text())
    about["filters"], about["dtype"] = [{"id": id}], "|O" if id == "pickle" else about["dtype"]
    about["fill_value"] = 0
    (path / "data/action/.zarray").write_text(json.dumps(about))
    with pytest.raises(DataError, match=message):
        ReplayBufferReader(path, rate_hz=10).scan()
