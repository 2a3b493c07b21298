"""LeRobotDataset v3.0 as its official writer made it, and the same episodes laid out as v2.1."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from films import cut, film, number, picture
from PIL import Image

from data_tools.convert.driver import convert
from data_tools.convert.plan import Settings, make_plan
from data_tools.formats.lerobot import LerobotReader
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError

REAL = "lerobot_v3_libero"
CAMERAS = {"front": "observation.images.front", "wrist": "observation.images.wrist"}
TEXT = "pick up the alphabet soup and place it in the basket"
#: Mean of these frames (over the whole dataset) as the official LeRobotDataset of lerobot-dataset 0.4.4 gives them with
#: torchcodec 0.13 on FFmpeg 7. All 418 frames of both cameras were compared with this reader's once: no value differed.
OFFICIAL = {
    "front": {0: 101.1416, 139: 103.0411, 140: 101.3557, 278: 103.0950, 279: 101.3658, 417: 103.0097},
    "wrist": {0: 98.8468, 139: 110.9631, 140: 97.4749, 278: 111.9584, 279: 96.4381, 417: 110.9956},
}


def sequential(path: Path) -> list[np.ndarray]:
    """Every frame of a video, by FFmpeg alone."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_official_dataset_is_read_as_the_official_reader_does(sample_data: Callable[[str], Path]) -> None:
    root = sample_data(REAL)
    reader = pickle.loads(pickle.dumps(LerobotReader(root, action_kind="libero")))
    scan = reader.scan()
    assert [(e.id, e.length, e.instruction, e.split) for e in scan.episodes] == [
        (f"episode_{i:06d}", n, TEXT, "train") for i, n in enumerate((140, 139, 139))
    ]
    assert (scan.cameras, scan.rate_hz, scan.proprio_dim, scan.bad) == (["front", "wrist"], 20.0, 8, [])
    assert scan.action is not None
    assert (scan.action.dim, scan.action.mode, scan.action.metres, scan.action.gripper_open) == (7, "delta", 0.05, -1)
    rows = pq.read_table(next((root / "data").rglob("*.parquet")))
    plain = {c: sequential(next((root / "videos" / key).rglob("*.mp4"))) for c, key in CAMERAS.items()}
    first = 0
    for episode in scan.episodes:
        data = reader.read(episode)
        mine = rows.slice(first, episode.length)
        np.testing.assert_array_equal(data.actions, np.float32(mine["action"].to_pylist()))
        np.testing.assert_array_equal(data.proprio, np.float32(mine["observation.state"].to_pylist()))
        np.testing.assert_allclose(data.times, mine["timestamp"].to_numpy(), atol=1e-6)
        for camera in CAMERAS:
            wanted = [0, 1, 50, episode.length - 1]
            for t, image in zip(wanted, data.frames[camera](wanted), strict=True):
                official = plain[camera][first + t].astype(int)
                assert np.abs(image - official).max() <= 1
                if first + t in OFFICIAL[camera]:
                    assert image.mean() == pytest.approx(OFFICIAL[camera][first + t], abs=0.5)
        first += episode.length
    assert first == 418


def remux(path: Path, start: float, end: float, to: Path) -> None:
    """Copy the packets of a part; LeRobot's episodes begin with a keyframe."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path)) as source, av.open(str(to), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream, opaque=True)
        assert stream.time_base is not None
        offset = round(start / stream.time_base)
        for packet in source.demux(stream):
            if packet.pts is not None and packet.dts is not None and start <= packet.pts * stream.time_base < end:
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copy
                out.mux(packet)


@pytest.fixture(scope="session")
def v21(sample_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official dataset as v2.1, with the faults of public ones: it says v3.0, and its videos are in `video/`."""
    real, root = sample_data(REAL), tmp_path_factory.mktemp("lerobot") / "v21"
    (root / "meta").mkdir(parents=True)
    shutil.copyfile(real / "meta/info.json", root / "meta/info.json")
    rows = pq.read_table(next((real / "data").rglob("*.parquet")))
    table = pq.read_table(next((real / "meta/episodes").rglob("*.parquet"))).to_pylist()
    lines = []
    for row in table:
        index = row["episode_index"]
        path = root / f"data/chunk-000/episode_{index:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows.filter(pc.equal(rows["episode_index"], index)), path)
        for key in CAMERAS.values():
            video = next((real / "videos" / key).rglob("*.mp4"))
            begin, end = (row[f"videos/{key}/{side}_timestamp"] for side in ("from", "to"))
            remux(video, begin, end, root / f"video/chunk-000/{key}/episode_{index:06d}.mp4")
        lines.append({"episode_index": index, "tasks": row["tasks"], "length": row["length"], "success": True})
    (root / "meta/episodes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": TEXT}) + "\n")
    return root


def test_v21_gives_the_same_episodes_and_values(v21: Path, sample_data: Callable[[str], Path]) -> None:
    new, old = LerobotReader(sample_data(REAL)), LerobotReader(v21)
    ours, theirs = old.scan(), new.scan()
    assert (ours.options["layout"], theirs.options["layout"]) == ("2.1", "3.0")
    assert ours.action == theirs.action
    assert ours.action is not None
    assert (ours.action.mode, ours.action.text) == ("other", "action as stored: x, y, z, rx, ry, rz, gripper")
    assert [e.meta for e in ours.episodes] == [{"success": True}] * 3
    for a, b in zip(ours.episodes, theirs.episodes, strict=True):
        assert (a.id, a.length, a.instruction, a.split) == (b.id, b.length, b.instruction, b.split)
        x, y = old.read(a), new.read(b)
        for name in ("times", "actions", "proprio"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
        for camera in CAMERAS:
            wanted = [0, 5, 77, a.length - 1]
            for mine, other in zip(x.frames[camera](wanted), y.frames[camera](wanted), strict=True):
                np.testing.assert_array_equal(mine, other)


def small(root: Path, *, video: bool = True, lengths: tuple[int, ...] = (12, 15, 18)) -> Path:
    """A v2.1 dataset of our own: 64 px h264, or PNGs in parquet; frame t of episode e shows 40 e + t."""
    (root / "meta").mkdir(parents=True)
    features: dict[str, Any] = {
        "observation.image": {"dtype": "video" if video else "image", "shape": [64, 64, 3]},
        "observation.depth": {"dtype": "video", "shape": [64, 64, 1], "info": {"video.is_depth_map": True}},
        "observation.state": {"dtype": "float32", "shape": [1]},
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["hip", "claw"]}},
    }
    (root / "meta/info.json").write_text(json.dumps({"fps": 10, "features": features, "splits": {"test": "1:2"}}))
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "wave"}\n')
    lines = []
    for e, n in enumerate(lengths):
        columns: dict[str, Any] = {
            "observation.state": np.arange(n, dtype=np.float32),
            "action": pa.array([[t, e] for t in range(n)], pa.list_(pa.float32())),
            "timestamp": np.arange(n, dtype=np.float32) / np.float32(10),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, e),
            "task_index": np.zeros(n, np.int64),
        }
        pictures = [picture(40 * e + t) for t in range(n)]
        if video:
            film(root / f"videos/chunk-000/observation.image/episode_{e:06d}.mp4", pictures, rate=10, b_frames=2)
        else:
            columns["observation.image"] = pa.array([{"bytes": png(p), "path": None} for p in pictures])
        path = root / f"data/chunk-000/episode_{e:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        lines.append({"episode_index": e, "tasks": [0], "length": n})
    (root / "meta/episodes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return root


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("video", [True, False])
def test_cameras_in_videos_and_in_parquet(tmp_path: Path, video: bool) -> None:
    reader = LerobotReader(small(tmp_path / "set", video=video), gripper=1, cameras=["observation.image"])
    scan = reader.scan()
    assert scan.cameras == ["image"]
    assert scan.action is not None
    assert (scan.action.text, scan.action.gripper) == ("action as stored: hip, claw", 1)
    assert [(e.instruction, e.split) for e in scan.episodes] == [("wave", ""), ("wave", "test"), ("wave", "")]
    data = reader.read(scan.episodes[1])
    assert (data.actions.shape, data.proprio.shape) == ((15, 2), (15, 1))
    images = [
        np.asarray(Image.open(io.BytesIO(i))) if isinstance(i, bytes) else i for i in data.frames["image"]([2, 2, 9])
    ]
    assert [number(image) for image in images] == [42, 42, 49]


def rewrite(path: Path, **columns: Any) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, path)


def damage(root: Path, how: str) -> None:
    data = root / "data/chunk-000/episode_000001.parquet"
    video = root / "videos/chunk-000/observation.image/episode_000001.mp4"
    if how == "truncated parquet":
        cut(data, 0.6)
    elif how == "missing parquet":
        data.unlink()
    elif how == "missing video":
        video.unlink()
    elif how == "truncated video":
        cut(video, 0.6)
    elif how == "short video":
        film(video, 9, rate=10)
    elif how == "another action":
        rewrite(data, action=pa.array([[0.0]] * 15, pa.list_(pa.float32(), 1)))
    elif how == "one action longer":
        rewrite(data, action=pa.array([[0.0, 0.0]] * 14 + [[0.0, 0.0, 0.0]], pa.list_(pa.float32())))
    elif how == "rows lost":
        pq.write_table(pq.read_table(data).slice(0, 11), data)
    elif how == "time stands still":
        rewrite(data, timestamp=pa.array(np.zeros(15, np.float32)))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated parquet", r"episode_000001\.parquet: truncated or no parquet file"),
        ("missing parquet", "its data file is missing"),
        ("missing video", r"its video file of observation\.image is missing"),
        ("truncated video", r"episode_000001\.mp4: truncated or corrupt video"),
        (
            "short video",
            r"episode_000001\.mp4 has 9 frames for 15 rows, .* the first row 9 at 0\.900 s",
        ),
        ("another action", r"episode_000001\.parquet: action has 1 numbers; info\.json says 2"),
        ("one action longer", r"action has 3 numbers at frame 14; info\.json says 2"),
        ("rows lost", r"episode_000001\.parquet: 11 rows; the episode table says 15"),
        ("time stands still", "timestamps do not increase at frame 1"),
    ],
)
def test_one_bad_episode_is_skipped_and_named(tmp_path: Path, how: str, reason: str) -> None:
    damage(small(tmp_path / "set"), how)
    manifest, _ = convert("lerobot", tmp_path / "set", tmp_path / "out", size=32, val_fraction=0, quiet=True)
    assert [e.id for e in read_episodes(tmp_path / "out", "train")] == ["episode_000000", "episode_000002"]
    (skipped,) = manifest.skipped
    with pytest.raises(DataError, match=rf"^episode_000001: .*({reason})"):
        raise DataError(skipped)


def test_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no meta/info\.json: not a LeRobotDataset"):
        LerobotReader(tmp_path).scan()
    root = small(tmp_path / "set")
    (root / "meta/episodes.jsonl").rename(root / "meta/episodes.old")
    with pytest.raises(DataError, match=r"neither LeRobot v2\.1 .* nor v3\.0 .*; of these it has data/"):
        LerobotReader(root).scan()
    with pytest.raises(DataError) as caught:
        LerobotReader(root, cameras=["top"], action_kind="libero", gripper=9).scan()
    for part in ("cameras: no top; there is: image", "libero has 7 numbers, but action has 2", "gripper: 9 must be"):
        assert part in str(caught.value)


def test_real_dataset_to_shards(tmp_path: Path, sample_data: Callable[[str], Path]) -> None:
    manifest, _ = convert(
        "lerobot", sample_data(REAL), tmp_path / "out", size=32, val_fraction=0, rate_hz=5.0, processes=1, quiet=True,
        options={"action_kind": "libero", "cameras": ["wrist"]},
    )  # fmt: skip
    assert (manifest.cameras, manifest.rate_hz, manifest.skipped) == (["wrist"], 5.0, [])
    assert manifest.splits["train"].frames == 3 * 35
    assert [(e.length, e.instruction) for e in read_episodes(tmp_path / "out", "train")] == [(35, TEXT)] * 3
    assert manifest.frame_size == (256, 256)
    assert not any("enlarged" in note for note in manifest.notes)


def test_larger_frames_than_there_are_are_said(sample_data: Callable[[str], Path]) -> None:
    small, large = (make_plan("lerobot", sample_data(REAL), "x", Settings(size=size)).manifest for size in (256, 300))
    [said] = set(large.notes) - set(small.notes)
    assert said.startswith("frames: 256 × 256 pixels, enlarged to 300 × 300")
    assert said.endswith("--size 256 does not enlarge them")
