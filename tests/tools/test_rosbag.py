"""Bags that rosbags writes: rosbag2 in SQLite and MCAP, and ROS 1's."""

from __future__ import annotations

import pickle
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

pytest.importorskip("rosbags", reason="needs the [ros] extra: pip install -e '.[ros]'")

from bags import KINDS, Said, Words, write_bag

from data_tools.convert.driver import convert
from data_tools.formats.registry import open_reader, parse_options
from data_tools.formats.rosbag import RosbagReader
from data_tools.formats.rosbag_clock import pair
from data_tools.images import decode
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError

FRAMES = 12
START = 1000.0
OPTIONS: dict[str, Any] = {"action": ["/cmd_vel"], "mode": "velocity", "rotation": "rotvec", "gripper": "absent"}


def pixels(number: int, width: int = 10) -> np.ndarray:
    """Red of the value 20 n + 5, blue below it."""
    image = np.zeros((8, width, 3), np.uint8)
    image[:4, :, 0] = 20 * number + 5
    image[4:, :, 2] = 255
    return image


def moments(words: Words, frames: int = FRAMES) -> list[Said]:
    """A camera of 10 Hz, one of 5 Hz, joints of 50 Hz from 0.15 s on, commands of 10 Hz 5 ms after each frame."""
    said: list[Said] = []
    for k in range(frames):
        at = START + k / 10
        said.append(("/cam/image_raw", at, words.image(pixels(k), pad=2, seconds=at - 0.05)))
        said.append(("/cam/depth", at, words.image(np.zeros((8, 10), np.uint16), "16UC1")))
        said.append(("/cmd_vel", at + 0.005, words.twist(k / 10, 0, 0, 0, 0, -k / 5)))
        if k % 2 == 0:
            jpeg = simplejpeg.encode_jpeg(pixels(k), 95, "RGB", "444")
            said.append(("/wrist/compressed", at, words.compressed(jpeg)))
    said += [("/joint_states", START + 0.15 + t / 50, words.joints([t, t + 0.5])) for t in range(5 * frames)]
    return [*said, ("/task", START + 0.35, words.text("lift it")), ("/task", START + 0.75, words.text("put it down"))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bag(tmp_path: Path, kind: str) -> None:
    words = Words(kind)
    path = write_bag(tmp_path / "lab" / ("a.bag" if kind == "ros1" else "a"), kind, moments(words), words)
    reader = pickle.loads(pickle.dumps(RosbagReader(tmp_path, **OPTIONS, instruction_topic="/task")))
    scan = reader.scan()
    (episode,) = scan.episodes
    assert (episode.id, episode.length, episode.instruction) == ("lab/a", FRAMES - 2, "lift it")
    assert (scan.cameras, scan.rate_hz, scan.proprio_dim) == (["cam_image_raw", "wrist_compressed"], 10, 2)
    assert scan.action is not None
    assert (scan.action.dim, scan.action.mode) == (6, "velocity")
    said = "\n".join(scan.notes)
    assert "/cam/depth left out: depth, 16UC1" in said
    assert "frames: 2 before every topic had spoken and 0 after one had fallen silent are left out, in 1 of 1" in said
    data = reader.read(episode)
    np.testing.assert_allclose(data.times, np.arange(FRAMES - 2) / 10, atol=1e-6)
    np.testing.assert_allclose(data.actions[:, 0], np.arange(1, FRAMES - 1) / 10)  # the frame before's: none to come
    np.testing.assert_allclose(data.actions[:, 5], -np.arange(1, FRAMES - 1) / 5)
    np.testing.assert_allclose(data.proprio[:, 0], [(t + 0.05) // 0.02 for t in data.times + 1e-9])
    assert data.instructions == [""] * 2 + ["lift it"] * 4 + ["put it down"] * 4
    frames = list(data.frames["cam_image_raw"]([0, 3, 9]))
    np.testing.assert_array_equal(np.stack(frames), [pixels(k) for k in (2, 5, 11)])  # type: ignore[arg-type]
    wrist = list(data.frames["wrist_compressed"](range(4)))
    assert all(isinstance(image, bytes) for image in wrist)
    assert [int(decode(image)[0, 0, 0]) // 20 for image in wrist] == [2, 2, 4, 4]  # type: ignore[arg-type]
    alone = RosbagReader(path).scan()
    assert [e.id for e in alone.episodes] == ["a"]
    assert alone.action is None
    assert "/cmd_vel (geometry_msgs/msg/Twist)" in "\n".join(alone.notes)
    assert "take one with --set instruction_topic=/TOPIC" in "\n".join(alone.notes)


def test_the_command_after_the_frame_and_headers_times(tmp_path: Path) -> None:
    words = Words()
    path = write_bag(tmp_path / "a", "mcap", moments(words), words)
    options = parse_options("rosbag", ["action=/cmd_vel.linear.x", "mode=other", "action_at=next", "proprio=none"])
    reader = open_reader("rosbag", path, options)
    (episode,) = reader.scan().episodes
    data = reader.read(episode)
    assert (episode.length, data.proprio.shape) == (FRAMES - 2, (FRAMES - 2, 0))
    np.testing.assert_allclose(data.actions[:, 0], np.arange(1, FRAMES - 1) / 10)
    with pytest.raises(DataError, match=r"/cmd_vel: its messages \(geometry_msgs/msg/Twist\) have no header"):
        RosbagReader(path, action=["/cmd_vel"], stamps="header").scan()
    said = [
        *moments(words),
        *(("/x", START + k / 10 + 0.01, words.joints([k], seconds=START + k / 10)) for k in range(12)),
    ]
    path = write_bag(tmp_path / "b", "mcap", said, words)
    reader = RosbagReader(path, cameras=["/cam/image_raw"], proprio=["/x.position"], stamps="header")
    data = reader.read(reader.scan().episodes[0])
    np.testing.assert_allclose(data.proprio[:, 0], np.arange(11))


def test_messages_that_are_too_old(tmp_path: Path) -> None:
    words = Words()
    gap = [s for s in moments(words) if not (s[0] == "/joint_states" and START + 0.4 < s[1] < START + 0.7)]
    path = write_bag(tmp_path / "a", "mcap", gap, words)
    with pytest.raises(DataError, match=r"a: /joint_states: at 0.60 s its latest message is 0.21 s old \(2 frames"):
        RosbagReader(path).scan()
    assert RosbagReader(path, max_age=0.5).scan().episodes[0].length == FRAMES - 2
    end = [s for s in moments(words) if not (s[0] == "/joint_states" and s[1] > START + 0.6)]
    path = write_bag(tmp_path / "b", "mcap", end, words)
    scan = RosbagReader(path, cameras=["/cam/image_raw"]).scan()
    assert "2 before every topic had spoken and 4 after one had fallen silent" in "\n".join(scan.notes)
    assert scan.episodes[0].length == FRAMES - 6


def test_pairs_are_never_of_the_future() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        times = {name: np.sort(rng.integers(0, 10**9, 40)) for name in "abc"}
        paired = pair(times, "a", max_age=10)
        for name, row in paired.rows.items():
            assert (times[name][row] <= paired.times).all()
            later = np.minimum(row + 1, 39)
            assert (
                (times[name][later] > paired.times) | (later == row) | (times[name][later] == times[name][row])
            ).all()
        assert paired.early + len(paired.times) + paired.late == 40


def test_encodings(tmp_path: Path) -> None:
    words = Words()
    red = pixels(3)
    grey = np.full((8, 10), 70, np.uint8)
    alpha = np.dstack([red, np.full((8, 10), 255, np.uint8)])
    encoded = {
        "rgb": words.image(red),
        "bgr": words.image(red[..., ::-1].copy(), "bgr8", pad=3),
        "rgba": words.image(alpha, "rgba8"),
        "bgra": words.image(alpha[..., [2, 1, 0, 3]].copy(), "bgra8"),
        "mono": words.image(grey[..., None], "mono8"),
        "bayer": words.image(grey[..., None], "bayer_rggb8"),
        "raw": words.image(np.zeros((8, 10), np.float32), "32FC1"),
        "rgb/compressed": words.compressed(b"\xff\xd8", "rgb8; jpeg compressed bgr8"),
        "video": words.compressed(b"\0\0\0\1", "h264"),
        "depth/compressedDepth": words.compressed(b"\0" * 12 + b"\x89PNG", "16UC1; compressedDepth png"),
    }
    said = [(f"/{name}", START + t / 10, image) for name, image in encoded.items() for t in range(3)]
    path = write_bag(tmp_path / "a", "mcap", said, words)
    reader = RosbagReader(path)
    scan = reader.scan()
    assert scan.cameras == ["bgr", "bgra", "mono", "rgb", "rgba"]
    text = "\n".join(scan.notes)
    for part in (
        "/bayer left out: encoding 'bayer_rggb8'", "/raw left out: depth, 32FC1", "/rgb has the same pictures",
        "/video left out: format 'h264', neither JPEG nor PNG", "/depth/compressedDepth left out: depth",
    ):  # fmt: skip
        assert part in text
    frames = reader.read(scan.episodes[0]).frames
    for name in ("rgb", "bgr", "rgba", "bgra"):
        (image,) = frames[name]([1])
        np.testing.assert_array_equal(image, red)
    (image,) = frames["mono"]([2])
    assert isinstance(image, np.ndarray)
    assert (image.shape, int(image.min()), int(image.max())) == ((8, 10, 3), 70, 70)
    with pytest.raises(DataError, match=r"no camera /video; topics with pictures are: .*/video \(format 'h264'"):
        RosbagReader(path, cameras=["/video"]).scan()


def test_absolute_poses_become_deltas(tmp_path: Path) -> None:
    words = Words()
    half = np.sin(0.05), np.cos(0.05)
    said = moments(words)
    for k in range(FRAMES):
        at = START + k / 10
        said.append(("/tool", at, words.pose(0.01 * k, 0, 0.5, 0, 0, 0, 1)))
        said.append(("/target", at, words.pose(0.01 * k + 0.02, 0, 0.5, 0, 0, *half)))
    path = write_bag(tmp_path / "in" / "a", "mcap", said, words)
    options = parse_options(
        "rosbag",
        ["action=/target", "mode=absolute", "rotation=quat_xyzw", "gripper=absent", "pose=/tool.pose", "max_age=1"],
    )
    manifest, _ = convert("rosbag", path.parent, tmp_path / "out", size=8, quiet=True, rate_hz=5, options=options)
    assert (manifest.rate_hz, manifest.action_dim, manifest.proprio_dim, manifest.skipped) == (5, 6, 2, [])
    assert read_episodes(tmp_path / "out", "train")[0].length == 5
    reader = open_reader("rosbag", path, options)
    data = reader.read(reader.scan().episodes[0])
    assert data.pose is not None
    np.testing.assert_allclose(data.pose[:, 0], 0.01 * np.arange(2, FRAMES), atol=1e-12)


def test_types_that_the_bag_does_not_define(tmp_path: Path) -> None:
    """As SQLite bags before Iron: messages, and no definitions."""
    from rosbags.typesys import get_types_from_msg

    words = Words()
    words.store.register(get_types_from_msg("float64[] values\nstring note", "lab_msgs/msg/Hand"))
    said = [*moments(words), *(("/hand", START + k / 50, words.make("lab_msgs/msg/Hand", np.array([k, 1.0]), "")) for k in range(60))]  # fmt: skip # noqa: E501
    path = write_bag(tmp_path / "a", "sqlite3", said, words, version=8)
    with sqlite3.connect(next(path.glob("*.db3"))) as database:
        database.execute("DELETE FROM message_definitions")
    assert RosbagReader(path).scan().proprio_dim == 2
    with pytest.raises(DataError, match=r"/hand: the bag does not define its type lab_msgs/msg/Hand; give the folder"):
        RosbagReader(path, proprio=["/hand.values"]).scan()
    (tmp_path / "types" / "lab_msgs" / "msg").mkdir(parents=True)
    (tmp_path / "types" / "lab_msgs" / "msg" / "Hand.msg").write_text("float64[] values\nstring note\n")
    scan = RosbagReader(path, proprio=["/hand.values"], definitions=tmp_path / "types").scan()
    assert scan.proprio_dim == 2
    own = write_bag(tmp_path / "own", "mcap", said, words)
    assert RosbagReader(own, proprio=["/hand"]).scan().proprio_dim == 2


def test_faults_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words()
    path = write_bag(tmp_path / "a", "mcap", moments(words), words)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"action": ["/cmd"]}, r"no messages of /cmd; it has /cam/depth \(sensor_msgs/msg/Image\), .*/cmd_vel"),
        ({"action": ["/cmd_vel.linear.w"]}, r"/cmd_vel.linear.w: no w in its messages; they have linear, angular"),
        ({"proprio": ["/task.data"]}, r"/task.data: no numbers in it"),
        ({"instruction_topic": "/cmd_vel.linear.x"}, r"/cmd_vel.linear.x: float, no text"),
        ({"clock": "/top"}, r"clock: /top is no camera; there is cam_image_raw, wrist_compressed"),
        ({"action_at": "then", "mode": "delta"}, r"action_at: 'then' must be one of now, next\nmode: delta also needs"),
        (OPTIONS | {"action": ["/cmd_vel.linear"], "gripper": "1,0"}, r"action: /cmd_vel.linear has 3 dimensions"),
    ]
    for options, text in cases:
        with pytest.raises(DataError, match=text):
            RosbagReader(path, **options).scan()
    both = [*moments(words), *(("/joint_states", START + k / 50, words.joints([1, 2], ["x", "y"])) for k in range(60))]
    reader = RosbagReader(write_bag(tmp_path / "b", "mcap", both, words))
    with pytest.raises(DataError, match=r"/joint_states: its messages name x, y, then j0, j1: more than one thing"):
        reader.scan()
    (file,) = path.glob("*.mcap")
    for content in (file.read_bytes()[:-40], b"no bag", b""):
        broken = tmp_path / "broken.mcap"
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"no bag can be used; broken: not a whole bag \(") as caught:
            RosbagReader(broken).scan()
        assert "\n" not in str(caught.value)
    (tmp_path / "pointer").mkdir()
    (tmp_path / "pointer" / "x.bag").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="Git LFS pointer"):
        RosbagReader(tmp_path / "pointer").scan()
    (tmp_path / "pointer" / "none").mkdir()
    with pytest.raises(DataError, match=r"no \.bag or \.mcap or \.db3 file"):
        RosbagReader(tmp_path / "pointer" / "none").scan()
    monkeypatch.setitem(sys.modules, "rosbags.highlevel", None)
    with pytest.raises(DataError, match=r"needs the package rosbags; .*install -e '.*\[ros\]'"):
        RosbagReader(path).scan()


@pytest.mark.parametrize("where", ["type", "nested type"])
def test_a_definition_that_is_code_is_not_run(tmp_path: Path, where: str) -> None:
    """rosbags writes Python with the names that a bag gives, which its grammar must not let through."""
    words, ran = Words(), tmp_path / "ran"
    name = f"B(exec(bytes({list(f'open({str(ran)!r}, chr(119)).close()'.encode())})))"
    kind, text = (f"a/msg/{name}", "int32 x\n") if where == "type" else ("a/msg/A", f"{name} x\n")
    path = write_bag(tmp_path / "a", "mcap", moments(words), words, more=[("/evil", kind, text)])
    with pytest.raises(DataError, match="not a whole bag"):
        RosbagReader(path).scan()
    assert not ran.exists()
