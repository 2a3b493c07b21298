"""CALVIN's raw layout, as its dataset/README.md describes it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_tools.convert.driver import convert
from data_tools.convert.episode import Processing, read_episode
from data_tools.formats.calvin import CalvinReader
from data_tools.formats.calvin_language import read_annotations
from data_tools.formats.pickled import load_pickled
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError

RANGES = {"training": [(20, 39), (7, 18)], "validation": [(100, 109)]}
#: start, end, text; the second begins while the first holds.
WINDOWS = {"training": [(22, 29, "push the red block"), (28, 33, "open the drawer")], "validation": []}


def state(number: int) -> np.ndarray:
    """robot_obs (15,) of a frame: the hand points down and turns, as CALVIN's."""
    rng = np.random.default_rng(number)
    pose = [0.1 + number / 1000, -0.2, 0.5, 3.09 + rng.normal() / 100, -0.03 + rng.normal() / 100, 1.5 + number / 100]
    return np.array([*pose, 0.08, *rng.normal(size=7), 1.0])


def relative(action: np.ndarray, obs: np.ndarray) -> np.ndarray:
    """As README says: clipped to (-1, 1), scaled by 50 and 20; differences of Euler angles."""
    turn = (action[3:6] - obs[3:6] + np.pi) % (2 * np.pi) - np.pi
    return np.concatenate([np.clip((action[:3] - obs[:3]) * 50, -1, 1), np.clip(turn * 20, -1, 1), action[6:]])


def frame(number: int) -> dict[str, np.ndarray]:
    obs = state(number)
    moved = obs[:6] + np.random.default_rng(number + 1).uniform(-0.019, 0.019, 6)
    action = np.array([*((moved + np.pi) % (2 * np.pi) - np.pi), 1.0 if number % 2 else -1.0])
    action[:3] = moved[:3]
    return {
        "rgb_static": np.full((20, 20, 3), number % 256, np.uint8),
        "rgb_gripper": np.full((8, 8, 3), number % 256, np.uint8),
        "rgb_tactile": np.zeros((16, 12, 6), np.uint8),
        "depth_static": np.zeros((20, 20), np.float32),
        "robot_obs": obs,
        "scene_obs": np.zeros(24),
        "actions": action,
        "rel_actions": relative(action, obs),
    }


def annotations(windows: list[tuple[int, int, str]]) -> dict[str, Any]:
    return {
        "language": {
            "ann": [text for *_, text in windows],
            "task": [str(text).replace(" ", "_") for *_, text in windows],
            "emb": np.ones((len(windows), 1, 384), np.float32),
        },
        "info": {"episodes": [], "indx": [(np.int64(start), end) for start, end, _ in windows]},
    }


@pytest.fixture
def calvin(tmp_path: Path) -> Path:
    root = tmp_path / "task_D_D"
    for split, ranges in RANGES.items():
        (root / split / "lang_annotations").mkdir(parents=True)
        np.save(root / split / "ep_start_end_ids.npy", np.array(ranges))
        np.save(root / split / "lang_annotations" / "auto_lang_ann.npy", annotations(WINDOWS[split]))  # type: ignore[arg-type]
        for start, end in ranges:
            for number in range(start, end + 1):
                np.savez_compressed(root / split / f"episode_{number:07d}.npz", **frame(number))
    return root


def test_recordings_with_the_text_of_each_frame(calvin: Path) -> None:
    reader = pickle.loads(pickle.dumps(CalvinReader(calvin)))
    scan = reader.scan()
    assert [(e.id, e.length, e.split, e.instruction) for e in scan.episodes] == [
        ("training/0000007-0000018", 12, "training", ""),
        ("training/0000020-0000039", 20, "training", "push the red block"),
        ("validation/0000100-0000109", 10, "validation", ""),
    ]
    assert (scan.cameras, scan.rate_hz, scan.proprio_dim, scan.bad) == (["rgb_static", "rgb_gripper"], 30, 15, [])
    said = "\n".join(scan.notes)
    assert "1 of 2 annotated windows of training overlap" in said
    assert "rgb_tactile, depth_static left out" in said
    assert "2 of 3 episodes have none" in said
    data = reader.read(scan.episodes[1])
    assert data.instructions == [""] * 2 + [WINDOWS["training"][0][2]] * 6 + [WINDOWS["training"][1][2]] * 6 + [""] * 6
    np.testing.assert_allclose(data.actions, [frame(n)["rel_actions"] for n in range(20, 40)])
    np.testing.assert_allclose(data.proprio, [state(n) for n in range(20, 40)])
    assert [int(f[0, 0, 0]) for f in data.frames["rgb_gripper"]([0, 3, 19]) if isinstance(f, np.ndarray)] == [
        20, 23, 39,
    ]  # fmt: skip


def test_both_actions_say_the_same_motion(calvin: Path) -> None:
    """Angles that are added are no rotation of their own: the deltas are those of the poses to reach."""
    moves = {}
    for name in ("rel_actions", "actions"):
        reader = CalvinReader(calvin, action=name)  # type: ignore[arg-type]
        scan = reader.scan()
        found = read_episode(
            reader, scan.episodes[-1], Processing(16), cameras=scan.cameras, spec=scan.action, proprio_dim=15
        )
        moves[name] = found.vectors["action"]
    np.testing.assert_allclose(moves["rel_actions"], moves["actions"], atol=2e-6)
    target, now = frame(103)["actions"], state(103)
    turn = Rotation.from_euler("xyz", target[3:6]) * Rotation.from_euler("xyz", now[3:6]).inv()
    expected = [*(target[:3] - now[:3]), *turn.as_rotvec(), 1.0]
    np.testing.assert_allclose(moves["rel_actions"][3], expected, atol=2e-6)


def test_into_shards(calvin: Path, tmp_path: Path) -> None:
    manifest, _ = convert("calvin", calvin, tmp_path / "out", size=16, split_by="source", quiet=True)
    assert (manifest.action_dim, manifest.gripper, manifest.rate_hz, manifest.frame_size) == (7, 6, 30, (20, 20))
    assert "Euler angles" in manifest.original_convention
    (held,) = read_episodes(tmp_path / "out", "val")
    assert held.id == "validation/0000100-0000109"
    manifest, _ = convert(
        "calvin", calvin, tmp_path / "slow", size=16, rate_hz=10, action="absolute", quiet=True, drop_noops=True
    )
    assert (manifest.rate_hz, manifest.skipped) == (10, [])


def test_annotated_windows_as_episodes(calvin: Path) -> None:
    reader = CalvinReader(calvin, episodes="annotated")
    scan = reader.scan()
    assert [(e.id, e.length, e.instruction, e.task) for e in scan.episodes] == [
        ("training/0000022-0000029", 8, "push the red block", "push_the_red_block"),
        ("training/0000028-0000033", 6, "open the drawer", "open_the_drawer"),
    ]
    assert reader.read(scan.episodes[1]).instructions is None
    twice = [*WINDOWS["training"], (22, 29, "push it")]
    path = calvin / "training" / "lang_annotations" / "auto_lang_ann.npy"
    np.save(path, annotations(twice))  # type: ignore[arg-type]
    assert [e.id for e in reader.scan().episodes][:2] == ["training/0000022-0000029", "training/0000022-0000029-2"]
    path.rename(calvin / "training" / "auto.npy")
    with pytest.raises(DataError, match=r"lang_annotations/auto_lang_ann.npy: not there; episodes=annotated needs it"):
        reader.scan()


def test_long_recordings_are_cut_and_one_split_is_enough(calvin: Path) -> None:
    scan = CalvinReader(calvin / "training", longest=8, proprio=["none"], cameras=["rgb_gripper"]).scan()
    assert [(e.id, e.length) for e in scan.episodes] == [
        ("training/0000007-0000012", 6), ("training/0000013-0000018", 6),
        ("training/0000020-0000025", 6), ("training/0000026-0000032", 7), ("training/0000033-0000039", 7),
    ]  # fmt: skip
    assert (scan.proprio_dim, scan.cameras, scan.frame_size) == (0, ["rgb_gripper"], (8, 8))
    assert "2 of 2 recordings of training are longer than 8 frames" in "\n".join(scan.notes)
    assert CalvinReader(calvin / "training", longest=8).read(scan.episodes[3]).instructions == (
        ["push the red block"] * 2 + ["open the drawer"] * 5
    )


def test_faults_are_named(calvin: Path, tmp_path: Path) -> None:
    (calvin / "training" / "episode_0000025.npz").unlink()
    (calvin / "training" / "episode_0000010.npz").write_bytes(b"PK no")
    reader = CalvinReader(calvin)
    scan = reader.scan()
    assert scan.bad == ["training/0000020-0000039: 1 of its 20 frames are not there, the first is episode_0000025.npz"]
    with pytest.raises(DataError, match=r"^episode_0000010.npz: cannot be read"):
        reader.read(scan.episodes[0])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"cameras": ["depth_static"]}, r"no pictures depth_static; it has rgb_static uint8 \(20, 20, 3\)"),
        ({"proprio": ["robot"]}, r"no robot; it has"),
        ({"annotations": "lang_x"}, r"lang_x/auto_lang_ann.npy: not there; folders with annotations: lang_annotations"),
        ({"action": "act", "longest": 0}, r"action: 'act' must be one of rel_actions, actions, none\nlongest"),
    ]
    for options, text in cases:
        with pytest.raises(DataError, match=text):
            CalvinReader(calvin, **options).scan()
    with pytest.raises(DataError, match=r"no ep_start_end_ids.npy in it, nor in training or validation"):
        CalvinReader(tmp_path).scan()
    np.save(calvin / "training" / "ep_start_end_ids.npy", np.array([RANGES], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"ep_start_end_ids\.npy: cannot be read"):
        reader.scan()


class _Evil:
    """What runs `call(*arguments)` where it is unpickled as pickle does it."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def ran(*_: Any) -> None:
    raise AssertionError("what the file says was run")


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    import os

    mark = tmp_path / "ran"
    path = tmp_path / "a.npy"
    for evil in (
        _Evil(os.system, f"touch {mark}"),
        _Evil(eval, f"open({str(mark)!r}, 'w')"),
        _Evil(ran),
        _Evil(getattr, np.ndarray, "tofile"),
        _Evil(np.load, "x"),
        _Evil(np.lib.format.read_array, "x"),
    ):
        for value in (evil, {"info": evil}, annotations([(1, 2, evil)])):  # type: ignore[list-item]
            np.save(path, value)  # type: ignore[arg-type]
            with pytest.raises(DataError, match=r"a\.npy: its pickle is not read: it wants to call \S+, which") as e:
                read_annotations(path)
            assert "\n" not in str(e.value)
    assert not mark.exists()


def test_a_crafted_array_is_refused(tmp_path: Path) -> None:
    """Addresses as an array of objects: numpy itself would follow them where the type's flags are forged."""
    path = tmp_path / "a.npy"
    header = np.lib.format.header_data_from_array_1_0(np.zeros((), object))

    def write(shape: tuple[int, ...], kind: str, content: Any) -> None:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            array = _Evil(np.zeros(0).__reduce__()[0], np.ndarray, (0,), b"b")  # type: ignore[arg-type]
            array.__class__ = type("State", (_Evil,), {"__reduce__": lambda self: (self.call, self.arguments, self.s)})
            array.s = (1, shape, np.dtype(kind), False, content)  # type: ignore[attr-defined]
            pickle.dump(array, file, protocol=4)

    write((1,), "O", b"\0" * 8)
    with pytest.raises(DataError, match="it holds an array of object"):
        load_pickled(path)
    write((1 << 40,), "f8", b"\0" * 8)
    with pytest.raises(DataError, match=r"8 bytes are no float64 \(1099511627776,\)"):
        load_pickled(path)
    write((2,), "<i4", np.array([3, 4], "<i4").tobytes())
    np.testing.assert_array_equal(load_pickled(path), [3, 4])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="its pickle is not read"):
        load_pickled(path)
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match="it holds float64, no pickled objects"):
        load_pickled(path)
