"""RLDS: Bridge's values as tensorflow_datasets gives them, and damaged files."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from data_tools.convert.driver import convert
from data_tools.formats import tfds, tfrecord
from data_tools.formats.rlds import RldsReader
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError

BRIDGE = "bridge_rlds"
EPISODES = 7  # of each split
#: sha256 of all values of both splits as tensorflow_datasets 4.9.10 (TensorFlow 2.21.0) reads them in stored order:
#: builder_from_directory(…).as_dataset(split, shuffle_files=False), images with decoders=SkipDecoding() (the stored
#: JPEG); of each episode the features sorted by name: the name, then the value of every step, numbers as their bytes in
#: the declared type, texts and images behind their length (8 bytes, little endian). TensorFlow's digest of the 25
#: episodes a split of the original was this reader's; that of the sample is this reader's of the first 7 of the same.
TFDS_SHA256 = "b2703fc9e2f4b99bf21ec315e958446500af59dca181240216fe040debeaacb3"
#: sha256 of all its pictures decoded, by episode, camera and step. TensorFlow decodes JPEGs with the fast DCT.
TFDS_PIXELS_SHA256 = "0f18aca0c3922484d8161428b951344b1d4646a9420c750330d5aae899cd86ee"
TRAIN = "bridge_dataset-train.tfrecord-00000-of-00001"


@pytest.fixture
def bridge(sample_data: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    folder = tmp_path / "bridge" / "1.0.0"
    shutil.copytree(sample_data(BRIDGE) / "1.0.0", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def every_value(folder: Path) -> str:
    """The digest that TFDS_SHA256 is of."""
    dataset = tfds.open_dataset(folder)
    digest = hashlib.sha256()
    for shard in dataset.shards:
        for record in tfrecord.scan_records(shard.path)[0]:
            data = tfrecord.read_record(shard.path, record)
            found = tfds.read_features(data)
            for key, feature in sorted(dataset.features.items()):
                digest.update(key.encode())
                if feature.kind in ("image", "text"):
                    for value in tfrecord.bytes_list(lambda a, b, data=data: data[a:b], found[key]):
                        digest.update(len(value).to_bytes(8, "little") + value)
                else:
                    values = tfrecord.numbers(lambda a, b, data=data: data[a:b], found[key])
                    digest.update(values.astype(feature.dtype).tobytes())
    return digest.hexdigest()


def test_every_value_is_as_tensorflow_datasets_reads_it(sample_data: Callable[[str], Path]) -> None:
    """And the Reader hands these values on: actions, proprio and the pictures of every step."""
    assert every_value(sample_data(BRIDGE)) == TFDS_SHA256
    reader = RldsReader(sample_data(BRIDGE), drop_first=False)
    pixels = hashlib.sha256()
    for episode in reader.scan().episodes:
        data = reader.read(episode)
        record = tfrecord.Record(int(episode.key), episode.private["offset"], episode.private["bytes"])
        content = tfrecord.read_record(reader.dataset.folder / episode.file, record)
        found = tfds.read_features(content)
        for key, values in (("action", data.actions), ("observation/state", data.proprio)):
            np.testing.assert_array_equal(values, tfds.read_tensor(content, found, key, reader.dataset.steps[key]))
        for camera, frames in data.frames.items():
            stored = tfds.read_bytes(content, found, f"observation/{camera}")
            assert list(frames(range(episode.length))) == stored
            for picture in stored:
                pixels.update(simplejpeg.decode_jpeg(picture, "RGB", fastdct=True))
    assert pixels.hexdigest() == TFDS_PIXELS_SHA256


def test_bridge_episodes(sample_data: Callable[[str], Path]) -> None:
    """Two splits, the instruction, the first action (zero in Bridge) left out, in a process of its own."""
    source = sample_data(BRIDGE)
    reader = RldsReader(source)
    scan = reader.scan()
    assert scan.bad == []
    assert [e.split for e in scan.episodes] == ["train"] * EPISODES + ["val"] * EPISODES
    assert len({e.id for e in scan.episodes}) == 2 * EPISODES
    assert scan.cameras == ["image_0", "image_1", "image_2", "image_3"]
    assert scan.options["black_cameras"] == ["image_3"]
    assert (scan.rate_hz, scan.proprio_dim) == (5, 7)
    assert scan.action is not None
    assert (scan.action.dim, scan.action.mode, scan.action.gripper) == (7, "delta", 6)
    first = scan.episodes[0]
    assert (first.length, first.instruction) == (10, "put cup from counter or drying rack into sink")
    assert first.meta["file_path"].endswith("put_cup_from_counter_or_drying_rack_into_sink/val/out.npy")

    data = pickle.loads(pickle.dumps(reader)).read(first)
    whole = RldsReader(source, drop_first=False).read(first)
    assert data.actions.shape == (9, 7)
    assert np.abs(whole.actions[0, :6]).max() < 1e-5
    np.testing.assert_array_equal(data.actions, whole.actions[1:])
    np.testing.assert_array_equal(data.proprio, whole.proprio[1:])
    assert list(data.frames["image_0"]([0, 8])) == list(whole.frames["image_0"]([1, 9]))
    np.testing.assert_allclose(np.diff(data.times), 0.2)


def test_truncated_file_loses_its_rest(bridge: Path) -> None:
    path = bridge / TRAIN
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    whole = len(tfrecord.scan_records(path)[0])
    assert 1 < whole < EPISODES - 1

    reader = RldsReader(bridge)
    scan = reader.scan()

    assert len(scan.episodes) == whole + EPISODES
    assert len(scan.bad) == EPISODES - whole
    assert scan.bad[0].startswith(f"train/00000/{whole:06d}: {TRAIN}, record {whole}: truncated at byte")
    assert len(reader.read(scan.episodes[whole - 1]).actions) == 9


def test_corrupt_record_is_one_bad_episode(bridge: Path) -> None:
    path = bridge / TRAIN
    records, _ = tfrecord.scan_records(path)
    content = bytearray(path.read_bytes())
    content[records[3].offset + records[3].length // 2] ^= 1
    path.write_bytes(content)

    reader = RldsReader(bridge)
    scan = reader.scan()
    with pytest.raises(DataError, match="record 3 is corrupt") as error:
        reader.read(scan.episodes[3])
    assert TRAIN in str(error.value)
    assert len(reader.read(scan.episodes[4]).actions) == 9


def test_corrupt_length_loses_the_rest(bridge: Path) -> None:
    path = bridge / TRAIN
    records, _ = tfrecord.scan_records(path)
    content = bytearray(path.read_bytes())
    content[records[4].offset - 12] ^= 1  # the length's first byte
    path.write_bytes(content)
    scan = RldsReader(bridge).scan()
    assert len(scan.bad) == EPISODES - 4
    assert "record 4" in scan.bad[0]
    assert "corrupt" in scan.bad[0]


def test_missing_shard_is_counted(bridge: Path) -> None:
    (bridge / TRAIN).unlink()
    scan = RldsReader(bridge).scan()
    assert len(scan.bad) == EPISODES
    assert scan.bad[0] == f"train/00000/000000: {TRAIN} is missing, which dataset_info.json names"


def test_bridge_into_shards(bridge: Path, tmp_path: Path) -> None:
    """End to end with one corrupt episode: it is listed and skipped, its split kept, the rest is there."""
    path = bridge / TRAIN
    records, _ = tfrecord.scan_records(path)
    content = bytearray(path.read_bytes())
    content[records[3].offset + records[3].length // 2] ^= 1
    path.write_bytes(content)

    manifest, _ = convert(
        "rlds",
        bridge,
        tmp_path / "out",
        size=64,
        split_by="source",
        quiet=True,
        options={"cameras": ["image_0", "image_2"]},
    )
    expected = {"train": (EPISODES - 1, 9 * (EPISODES - 1)), "val": (EPISODES, 9 * EPISODES)}
    assert {k: (v.episodes, v.frames) for k, v in manifest.splits.items()} == expected
    assert len(manifest.skipped) == 1
    assert "train/00000/000003" in manifest.skipped[0]
    assert (manifest.cameras, manifest.rate_hz, manifest.action_dim) == (["image_0", "image_2"], 5, 7)
    first = read_episodes(tmp_path / "out", "train")[0]
    assert first.meta["episode_id"] == 5
