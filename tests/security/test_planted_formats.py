"""Datasets of others are read without running what they hold, and without the files that they point to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from payload import Payload, planted, works

from stamo_dist.errors import DataError

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
tiny_sources = pytest.importorskip("tiny_sources")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    found = tmp_path / "mark"
    works(found)
    return found


def convert(stamo: Callable[..., Any], root: Path, out: Path, *options: str) -> str:
    done = stamo("data", "convert", *options, root, out, check=False)
    return str(" ".join((done.stdout + done.stderr).split()))


def test_types_of_parquet(tmp_path: Path, mark: Path) -> None:
    """pyarrow once made a type of Python from a pickle in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_tools.formats.registry import open_reader

    tiny_sources.lerobot_v21(tmp_path / "set")
    for path in (tmp_path / "set").rglob("*.parquet"):
        table = pq.read_table(path)
        extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": planted(mark)}
        fields = [field.with_metadata(extension) for field in table.schema]
        pq.write_table(table.cast(pa.schema(fields)), path)
        assert pq.read_schema(path).field(0).metadata[b"ARROW:extension:metadata"] == planted(mark)
    reader = open_reader("lerobot", tmp_path / "set", {})
    for episode in reader.scan().episodes:
        reader.read(episode)
    assert not mark.exists()


def test_arrays_of_objects(tmp_path: Path, mark: Path) -> None:
    from data_tools.formats.pickled import load_pickled

    np.save(tmp_path / "a.npy", np.array([Payload(mark)], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"is not done|is not read"):
        load_pickled(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        np.load(tmp_path / "a.npy")
    assert not mark.exists()


def test_codecs_of_zarr(tmp_path: Path, mark: Path, stamo: Callable[..., Any]) -> None:
    root = tmp_path / "set"
    tiny_sources.zarr(root)
    (array,) = root.rglob("data/state/.zarray")
    about = json.loads(array.read_text())
    about |= {"filters": [{"id": "pickle"}], "dtype": "|O", "fill_value": 0, "compressor": None}
    array.write_text(json.dumps(about))
    for chunk in array.parent.glob("[0-9]*"):
        chunk.write_bytes(planted(mark))
    said = convert(stamo, root, tmp_path / "out", "zarr", "--set", "rate_hz=10")
    assert "pickle" in said
    assert not mark.exists()


def test_names_of_types_in_bags(tmp_path: Path, mark: Path) -> None:
    """rosbags writes Python from the definitions that a bag holds, and runs it."""
    rosbag1 = pytest.importorskip("rosbags.rosbag1", reason="needs the [ros] extra: pip install -e '.[ros]'")
    rosbag2 = pytest.importorskip("rosbags.rosbag2", reason="needs the [ros] extra: pip install -e '.[ros]'")
    from data_tools.formats.rosbag_files import open_bag

    evil = f'std_msgs/msg/X:\n    pass\nimport os\nos.mkdir({str(mark)!r}.replace("_", chr(47)))\nclass Y'
    with rosbag1.Writer(tmp_path / "a.bag") as writer:
        writer.write(writer.add_connection("/t", evil, msgdef="int8 a\n", md5sum="0" * 32), 1, b"\0")
    plugin = rosbag2.StoragePlugin.MCAP
    with rosbag2.Writer(tmp_path / "b", version=9, storage_plugin=plugin) as writer:
        topic = writer.add_connection("/t", evil, msgdef="int8 a\n", rihs01="RIHS01_" + "0" * 64)
        writer.write(topic, 1, b"\0\1\0\0\0")
    for name in ("a.bag", "b"):
        with pytest.raises(DataError, match="Could not parse"), open_bag(tmp_path / name):
            pass
    assert not mark.exists()


@pytest.mark.parametrize("how", ["link", "bytes", "virtual"])
def test_hdf5_that_lies_in_other_files(tmp_path: Path, stamo: Callable[..., Any], how: str) -> None:
    root, secret = tmp_path / "set", tmp_path / "secret.h5"
    root.mkdir()
    tiny_sources.libero(root)
    path = next(root.rglob("*.hdf5"))
    with h5py.File(path, "r+") as file, h5py.File(secret, "w") as other:
        demo = file["data/demo_0"]
        actions = demo["actions"][()]
        other["actions"] = actions
        del demo["actions"]
        if how == "link":
            demo["actions"] = h5py.ExternalLink(str(secret), "/actions")
        elif how == "bytes":
            (tmp_path / "secret").write_bytes(actions.tobytes())
            demo.create_dataset(
                "actions", actions.shape, actions.dtype, external=[(str(tmp_path / "secret"), 0, actions.nbytes)]
            )
        else:
            layout = h5py.VirtualLayout(actions.shape, actions.dtype)
            layout[:] = h5py.VirtualSource(str(secret), "actions", actions.shape)
            demo.create_virtual_dataset("actions", layout)
    said = convert(stamo, root, tmp_path / "out", "libero")
    assert "data/demo_0/actions lies in another file, which is not read" in said
    assert not os.path.exists(tmp_path / "out/manifest.json")
