"""RLDS of any robot: known conventions, instructions under any name, faults in its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import TEXT, image, png, tensor, write_tfds

from data_tools.convert.driver import convert
from data_tools.formats.declared import absolute_gripper
from data_tools.formats.rlds import RldsReader
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError

ACTION = {"action": tensor("float32", 7), "language_instruction": TEXT}
SIGHT = {"observation/image": image(8, 6, 3)}


def pictures(length: int, height: int = 8, width: int = 6) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 256, (length, height, width, 3), np.uint8)


def small(seed: int, length: int = 4, **more: Any) -> dict[str, Any]:
    actions = np.random.default_rng(seed).normal(size=(length, 7))
    return {
        "steps/action": actions,
        "steps/language_instruction": [b"", *[b"later"] * (length - 1)] if seed == 1 else [b"push it"] * length,
        "steps/observation/image": [png(p) for p in pictures(length)],
        "episode_metadata/file_path": [f"/raw/{seed}".encode()],
        **more,
    }


def test_unknown_dataset_says_what_it_needs_and_has(tmp_path: Path) -> None:
    source = write_tfds(tmp_path / "new" / "1.0.0", "new_robot", {**ACTION, **SIGHT}, [small(0)])
    with pytest.raises(DataError) as error:
        RldsReader(source, proprio=["observation/joints"]).scan()
    for word in ("rate_hz", "mode", "rotation", "gripper", "observation/joints", "observation/image: uint8 8×6×3, png"):
        assert word in str(error.value)

    reader = RldsReader(source, rate_hz=12.5, mode="delta", rotation="rotvec", gripper="-1,1", metres=0.01)
    scan = reader.scan()
    spec = scan.action
    assert spec is not None
    assert (spec.translation, spec.rotation, spec.rotation_kind, spec.metres) == ((0, 1, 2), (3, 4, 5), "rotvec", 0.01)
    assert (spec.gripper, spec.gripper_open, spec.gripper_closed) == (6, -1, 1)
    assert (scan.rate_hz, scan.proprio_dim) == (12.5, 0)
    assert scan.episodes[0].meta == {"file_path": "/raw/0"}
    data = reader.read(scan.episodes[0])
    np.testing.assert_array_equal(data.actions, small(0)["steps/action"].astype(np.float32))
    assert list(data.frames["image"]([2])) == [png(pictures(4)[2])]


def test_action_that_cannot_be_a_pose(tmp_path: Path) -> None:
    source = write_tfds(tmp_path / "new", "new_robot", {**ACTION, **SIGHT}, [small(0)])
    with pytest.raises(DataError, match=r"7 dimensions.*quat_xyzw.*would be 8"):
        RldsReader(source, rate_hz=5, mode="absolute", rotation="quat_xyzw", gripper="1,0").scan()


def test_openvla_libero_is_not_mirrored(tmp_path: Path) -> None:
    """The files are named after dataset_info.json, not the folder; pictures are mirrored there, and not here."""
    state = np.arange(32, dtype=float).reshape(4, 8)
    source = write_tfds(
        tmp_path / "libero_10_no_noops" / "1.0.0",
        "liber_o10",
        {**ACTION, **SIGHT, "observation/state": tensor("float32", 8)},
        [small(2, **{"steps/observation/state": state})],
    )
    reader = RldsReader(source.parent)
    scan = reader.scan()
    assert scan.rate_hz == 20
    assert scan.action is not None
    assert (scan.action.metres, scan.action.gripper_open) == (0.05, -1)
    (frame,) = reader.read(scan.episodes[0]).frames["image"]([1])
    np.testing.assert_array_equal(frame, pictures(4)[1][:, ::-1])


def test_droid_takes_action_dict_and_pose(tmp_path: Path) -> None:
    """float64 values, poses as rotation vectors, raw pixels, a tensor kept as compressed bytes."""
    import zlib

    rng = np.random.default_rng(0)
    length = 5
    raw = pictures(length, 4, 4)
    target, pose = rng.uniform(-1, 1, (length, 6)), np.zeros((length, 6))
    pose[:, :3], pose[:, 5] = rng.uniform(size=(length, 3)), np.pi / 2
    joints = rng.normal(size=(length, 7)).astype(np.float64)
    episode = {
        "steps/action_dict/cartesian_position": target,
        "steps/action_dict/gripper_position": rng.uniform(size=length),
        "steps/action": np.zeros((length, 7)),
        "steps/is_first": np.arange(length) == 0,
        "steps/language_instruction": [b""] * length,
        "steps/language_instruction_2": [b"fold the cloth"] * length,
        "steps/observation/cartesian_position": pose,
        "steps/observation/gripper_position": rng.uniform(size=length),
        "steps/observation/joint_position": [zlib.compress(j.tobytes()) for j in joints],
        "steps/observation/wrist_image_left": raw,
        "steps/observation/exterior_image_1_left": [png(p) for p in raw],
        "episode_metadata/file_path": [b"r2d2"],
    }
    steps = {
        "action_dict/cartesian_position": tensor("float64", 6),
        "action_dict/gripper_position": tensor("float64", 1),
        "action": tensor("float64", 7),
        "is_first": tensor("bool"),
        "language_instruction": TEXT,
        "language_instruction_2": TEXT,
        "observation/cartesian_position": tensor("float64", 6),
        "observation/gripper_position": tensor("float64", 1),
        "observation/joint_position": tensor("float64", 7, encoding="zlib"),
        "observation/wrist_image_left": tensor("uint8", 4, 4, 3),
        "observation/exterior_image_1_left": image(4, 4, 3),
    }
    reader = RldsReader(write_tfds(tmp_path / "droid" / "1.0.0", "droid_100", steps, [episode]))
    scan = reader.scan()
    assert (scan.rate_hz, scan.cameras, scan.proprio_dim) == (15, ["exterior_image_1_left", "wrist_image_left"], 14)
    assert scan.action is not None
    assert (scan.action.mode, scan.action.gripper_open, scan.action.gripper_closed) == ("absolute", 0, 1)
    assert scan.episodes[0].instruction == "fold the cloth"
    data = reader.read(scan.episodes[0])
    np.testing.assert_array_equal(data.actions[:, :6], target.astype(np.float32))
    np.testing.assert_array_equal(data.proprio[:, 7:], joints.astype(np.float32))
    assert data.pose is not None
    np.testing.assert_allclose(data.pose[:, 3:], [[0, 0, np.pi / 2]] * length, atol=1e-6)
    np.testing.assert_array_equal(np.stack(list(data.frames["wrist_image_left"]([0, 3]))), raw[[0, 3]])


def test_relative_gripper_becomes_absolute() -> None:
    """RT-1: +1 closes, -1 opens, 0 keeps; before the first command the gripper was the other way."""
    np.testing.assert_array_equal(absolute_gripper(np.array([0, 0, 1, 0, -1, 0, 0.05])), [1, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(absolute_gripper(np.array([0, -1, 0])), [0, 1, 1])


def test_pictures_and_actions_of_other_lengths(tmp_path: Path) -> None:
    broken = small(0) | {"steps/observation/image": [png(p) for p in pictures(3)]}
    reader = RldsReader(
        write_tfds(tmp_path / "new", "new_robot", {**ACTION, **SIGHT}, [broken]), rate_hz=5, mode="other"
    )
    with pytest.raises(DataError, match="steps/observation/image has 3 pictures for 4 actions"):
        reader.read(reader.scan().episodes[0])


KNOWN: dict[str, Any] = {"rate_hz": 5, "mode": "other"}


def test_each_step_has_its_own_instruction(tmp_path: Path) -> None:
    """Also where the first step has none, and where characters are stored as numbers."""
    texts = [b"open it", b"open it", b"put it in", b"put it in"]
    codes = np.zeros((4, 20), np.int64)
    for row, text in zip(codes, texts, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    steps = {**ACTION, **SIGHT, "observation/instruction": tensor("int32", 20)}
    numbers = {"steps/observation/instruction": codes}
    changing = small(0) | numbers | {"steps/language_instruction": texts}
    coded = small(0) | numbers | {"steps/language_instruction": [b""] * 4}
    source = write_tfds(tmp_path / "new", "new_robot", steps, [changing, coded, small(1) | numbers, small(2) | numbers])
    reader = RldsReader(source, **KNOWN)
    scan = reader.scan()
    assert [e.instruction for e in scan.episodes] == ["open it", "open it", "open it", "push it"]
    own = ["open it", "open it", "put it in", "put it in"]
    assert [reader.read(e).instructions for e in scan.episodes] == [own, own, own, None]
    alone = RldsReader(source, **KNOWN, instruction=["language_instruction"])
    third = alone.scan().episodes[2]
    assert (third.instruction, alone.read(third).instructions) == ("later", ["", "later", "later", "later"])

    manifest, _ = convert("rlds", source, tmp_path / "out", size=16, val_fraction=0, quiet=True, options=KNOWN)
    assert manifest.splits["train"].episodes == 4
    first = read_episodes(tmp_path / "out", "train")[0]
    assert (first.instruction, first.later_instructions) == ("open it", {2: "put it in"})


@pytest.mark.parametrize(
    ("key", "text"),
    [("observation/task_description", "lift"), ("episode_metadata/prompt", "lift"), ("observation/todo_text", "")],
)
def test_language_under_another_name(tmp_path: Path, key: str, text: str) -> None:
    """Usual names are taken, of the episode too; others are named with the ways out."""
    beside = key.startswith("episode_metadata/")
    episode = small(0) | {key if beside else f"steps/{key}": [b"lift"] if beside else [b"lift"] * 4}
    del episode["steps/language_instruction"]
    steps = {"action": ACTION["action"], **SIGHT, **({} if beside else {key: TEXT})}
    source = write_tfds(tmp_path / "new", "new_robot", steps, [episode], metadata={key: TEXT} if beside else {})
    scan = RldsReader(source, **KNOWN).scan()
    assert [e.instruction for e in scan.episodes] == [text]
    said = " ".join(scan.notes)
    assert ("1 of 1 episodes have none" in said) == (not text)
    if not text:
        assert key in said
        assert "--instructions FILE.csv" in said
    named = RldsReader(source, **KNOWN, instruction=[key]).scan()
    assert named.episodes[0].instruction == "lift"


def test_asked_for_and_absent(tmp_path: Path) -> None:
    source = write_tfds(tmp_path / "new", "new_robot", {**ACTION, **SIGHT}, [small(0)])
    with pytest.raises(DataError) as error:
        RldsReader(source, **KNOWN, action=["acton"], proprio=["stat"], instruction=["lang"], cameras=["top"]).scan()
    for word in ("no numeric acton", "no numeric 'stat'", "no text 'lang'", "no image 'top'", "  action: float32 7"):
        assert word in str(error.value)
    nothing = RldsReader(source, rate_hz=5, action=["none"], proprio=["none"], instruction=["none"])
    scan = nothing.scan()
    assert (scan.action, scan.proprio_dim, scan.episodes[0].instruction) == (None, 0, "")
    assert nothing.read(scan.episodes[0]).actions.shape == (4, 0)


def test_failures_are_said_and_left_out_when_asked(tmp_path: Path) -> None:
    episodes = [small(k) | {"episode_metadata/success": np.array([k != 2])} for k in (0, 2, 3)]
    source = write_tfds(
        tmp_path / "new", "new_robot", {**ACTION, **SIGHT}, episodes, metadata={"success": tensor("bool")}
    )
    scan = RldsReader(source, **KNOWN).scan()
    assert len(scan.episodes) == 3
    assert any("1 of 3 episodes failed, taken all the same" in note for note in scan.notes)
    assert any(note.startswith("proprio: none") for note in scan.notes)
    left = RldsReader(source, **KNOWN, only_successful=True).scan()
    assert [e.key for e in left.episodes] == ["0", "2"]


def test_images_are_turned(tmp_path: Path) -> None:
    source = write_tfds(tmp_path / "new", "new_robot", {**ACTION, **SIGHT}, [small(0)])
    reader = RldsReader(source, **KNOWN, image_orientation="rotated_180")
    (frame,) = reader.read(reader.scan().episodes[0]).frames["image"]([1])
    np.testing.assert_array_equal(frame, pictures(4)[1][::-1, ::-1])


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("features.json", '["7"]', '["seven"]', r"steps/action: shape\.dimensions"),
        ("features.json", '{"text": {}}', '"text"', r"file_path: 'text' is no feature"),
        (
            "features.json",
            '{"shape": {"dimensions": ["7"]}',
            '7, "x": {"shape": {}',
            r"steps/action, tensor: 7 is no JSON object",
        ),
        ("dataset_info.json", '["1"]', '["one"]', r"splits\.0, shardLengths: must be a whole number, not 'one'"),
        ("dataset_info.json", '["1"]', "[]", "splits: no file in any shardLengths"),
        (
            "dataset_info.json",
            '[{"name"',
            '[{"nom"',
            r"splits\.0, name: must be a name that no other split has, not null",
        ),
    ],
)
def test_metadata_faults_name_file_and_field(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    source = write_tfds(tmp_path / "new", "new_robot", {**ACTION, **SIGHT}, [small(0)])
    text = (source / file).read_text()
    assert old in text
    (source / file).write_text(text.replace(old, new))
    with pytest.raises(DataError, match=rf"{file}[:,] .*{message}"):
        RldsReader(source, **KNOWN).scan()


def test_no_tfds_folder_and_two_versions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset_info\.json"):
        RldsReader(tmp_path).scan()
    for version in ("1.0.0", "1.1.0"):
        write_tfds(tmp_path / "new" / version, "new_robot", {**ACTION, **SIGHT}, [small(0)])
    with pytest.raises(DataError, match=r"one at a time: new/1\.0\.0, new/1\.1\.0"):
        RldsReader(tmp_path).scan()
