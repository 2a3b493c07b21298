# ruff: noqa: E501  one line a case
"""Every kind of input that was once read wrongly, one line a case: what is right, or which words refuse it.

The inputs are in tests/tools/cases; values come from their making (see its README), never from what is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from remade import Samples, read

from data_tools.convert.driver import convert
from data_tools.formats.registry import parse_options
from data_tools.look.check import check
from stamo_dist.data.schema import Manifest, read_episodes
from stamo_dist.errors import DataError

CASES = Path(__file__).parent / "cases"
CUP, DRAWER = "pick up the red cup", "open the drawer"


@dataclass(frozen=True)
class Right:
    """What a case comes to; what is not said is not looked at.

    Attributes:
        refused: Words of the error, which is one line; the rest is then not looked at.
        lengths: Frames of each episode, in the table's order.
        texts: Instructions of each episode: from which frame on it has which.
        dims: Of action, original_action and proprio.
        notes: Words that are among the notes.
        silent: Words that are in no note.
        skipped: Words that are among the reasons why episodes were left out.
        values: A check of the samples of the first camera.
    """

    refused: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    texts: tuple[dict[int, str], ...] = ()
    dims: tuple[int, int, int] | None = None
    notes: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    values: Callable[[Samples], None] | None = None


def own_picture(samples: Samples) -> None:
    """Each row has its own picture: its red says the episode, its green the row, as the first number of its action."""
    for sample in samples:
        episode, row = divmod(sample["original_action"][0], 100)
        red, green, _ = simplejpeg.decode_jpeg(sample["image"]).reshape(-1, 3).mean(axis=0)
        assert (red, green) == (pytest.approx(40 * episode + 19, abs=4), pytest.approx(8 * row + 8, abs=4))


def twice_the_step(samples: Samples) -> None:
    """10 steps of 1 cm at 10 Hz are 5 of 2 cm at 5 Hz."""
    assert [s["action"][0] for s in samples] == pytest.approx([0.02] * len(samples))


def metres(samples: Samples) -> None:
    """The arm's numbers were stored in units of 5 cm and 0.5 rad, the gripper from -1 (open) to 1."""
    for sample in samples:
        stored, made = sample["original_action"], sample["action"]
        assert made[:3] == pytest.approx(stored[:3] * 0.05, abs=1e-6)
        assert made[6] == pytest.approx((1 - stored[6]) / 2, abs=1e-6)


ONE_CUP = ({0: CUP}, {0: CUP})
REACH = "mode=delta rotation=rotvec gripper=1,0"
BASE = "action=delta rotation=rotvec metres=0.05 radians=0.5 gripper=-1,1 gripper_dim=6"
LIBERO = "action=actions state=state action_kind=libero"
RLDS, HALF = "rate_hz=5 mode=other", {"rate_hz": 5.0}
# fmt: off
TABLE: list[tuple[str, str, str, dict[str, Any], Right]] = [
    ("hardware_times", "lerobot", "", {}, Right(lengths=(30, 30), values=own_picture, notes=("2 of 2 episodes have timestamps off the 10 Hz grid",))),
    ("openpi_names", "lerobot", "", {}, Right(dims=(7, 7, 7), notes=("action: taken from the feature actions", "state: taken from the feature state"))),
    ("typo", "lerobot", "action=acton", {}, Right(refused=("action: no feature acton", "did you mean action?", "observation.state"))),
    ("typo", "lerobot", "state=observation.stat", {}, Right(refused=("state: no feature observation.stat", "did you mean observation.state?"))),
    ("split_action_columns", "lerobot", "", {}, Right(refused=("action: no feature action or actions", "--set action=actions.joint.position,actions.effector.position"))),
    ("split_action_columns", "lerobot", "action=actions.joint.position,actions.effector.position", {}, Right(dims=(7, 7, 7), values=own_picture)),
    ("lerobot_libero_rotated", "lerobot", LIBERO, {}, Right(dims=(7, 7, 8), notes=("images: mirrored back",))),
    ("groot", "lerobot", "", {}, Right(texts=ONE_CUP, values=own_picture)),
    ("groot_with_frame_index", "lerobot", "", {}, Right(texts=ONE_CUP, values=own_picture)),
    ("v21_two_tasks", "lerobot", "", {}, Right(texts=({0: DRAWER, 6: "put the cup in"}, {0: DRAWER, 7: "put the cup in"}))),
    ("v21_tasks_string", "lerobot", "", {}, Right(texts=ONE_CUP, silent=("instructions: ",))),
    ("v30_no_tasks_column", "lerobot", "", {}, Right(texts=({0: CUP}, {0: DRAWER}), values=own_picture)),
    ("v30_overlap", "lerobot", "", {}, Right(refused=("file-000.mp4: windows overlap: episode 0 ends at 1.2 s, episode 1 begins at 0 s",))),
    ("v30_camera_null_in_one_episode", "lerobot", "", {}, Right(lengths=(12, 12), skipped=("episode_000001: ", "file-000.parquet, row 1, videos/observation.images.front/chunk_index: must be a whole number, not null"))),
    ("nan_action", "lerobot", "", {}, Right(lengths=(12, 12), skipped=("episode_000001: actions are not finite",))),
    ("eef_delta_unstated", "lerobot", "", HALF, Right(refused=("rate: 5 Hz leaves out frames of 10 Hz", "deltas would have to be added up", "--set action_kind=other"))),
    ("eef_delta_unstated", "lerobot", REACH, HALF, Right(lengths=(10, 10), values=twice_the_step)),
    ("constant_joint", "lerobot", "", {}, Right(dims=(3, 3, 3))),
    ("fps_None", "lerobot", "", {}, Right(refused=("info.json, fps: must be a positive number", "not null"))),
    ("fps_10", "lerobot", "", {}, Right(lengths=(12, 14), values=own_picture)),
    ("shape_missing", "lerobot", "", {}, Right(refused=("info.json, features.action.shape: must be a list of whole numbers",))),
    ("latin1", "lerobot", "", {}, Right(refused=("episodes.jsonl, line 1: not UTF-8 (byte 0xe9)",))),
    ("v21_index_lists", "lerobot", "", {}, Right(texts=ONE_CUP, values=own_picture)),
    ("img_binary", "lerobot", "", {}, Right(lengths=(12, 14), dims=(7, 7, 7))),
    ("u2028", "lerobot", "", {}, Right(lengths=(12, 14), notes=("have others in their rows than in the episode table", r"pick up the cup\u2028gently"))),
    ("u2028", "lerobot", "instruction=none", {}, Right(texts=({0: "pick up the cup\u2028gently"},) * 2)),
    ("video_one_short", "lerobot", "", {}, Right(lengths=(12, 13, 12), notes=("episode_000001: its last row is left out",))),
    ("rlds_lang_changes", "rlds", RLDS, {}, Right(texts=({0: DRAWER, 4: "put it in"},) * 2)),
    ("rlds_lang_other", "rlds", RLDS, {}, Right(texts=({0: "pick up the cup"},) * 2)),
    ("robomimic_no_env_args", "robomimic", "rate_hz=20", {}, Right(texts=({0: "pick the cup from the counter"},) * 2)),
    ("isaaclab_cam", "robomimic", "rate_hz=20", {}, Right(texts=({0: ""},) * 2, notes=("1 of 2 episodes failed, taken", "2 of 2 episodes have none", "numeric ones are: eef_pos (3,), eef_quat (4,), gripper_pos (2,)"))),
    ("isaaclab_cam", "robomimic", "rate_hz=20 only_successful=true proprio=eef_pos,gripper_pos", {}, Right(lengths=(12,), dims=(7, 7, 5), silent=("proprio", "taken all the same"))),
    ("robocasa12", "robomimic", "", {}, Right(dims=(12, 12, 9), notes=("12 dimensions as stored, the gripper too", "--set action=delta"))),
    ("robocasa12", "robomimic", BASE, {}, Right(dims=(7, 12, 9), values=metres, texts=({0: "pick the mug"},) * 2)),
    ("aloha_episode_0.hdf5", "aloha", "", {}, Right(lengths=(10,), dims=(14, 14, 14), notes=("1 of 1 episodes have none",))),
    ("mixed_suffixes", "video", "", {}, Right(lengths=(12,), notes=("left out: 1 .gif, 1 .m4v, 1 .mpg", "left out: 1 shorter than 2 frames", "one.mp4"))),
]
# fmt: on


@pytest.mark.parametrize(
    ("name", "format", "options", "settings", "right"), TABLE, ids=[f"{row[0]} {row[2]}".strip() for row in TABLE]
)
def test_case(
    tmp_path: Path, name: str, format: str, options: str, settings: dict[str, Any], right: Right
) -> None:  # fmt: skip
    def run() -> Manifest:
        given = parse_options(format, options.split())
        made = {"size": 32, "val_fraction": 0.0, "processes": 1, "quiet": True, **settings}
        return convert(format, CASES / name, tmp_path / "out", options=given, **made)[0]

    if right.refused:
        with pytest.raises(DataError) as caught:
            run()
        assert [word for word in right.refused if word not in str(caught.value)] == [], caught.value
        return
    manifest = run()
    episodes = read_episodes(tmp_path / "out", "train")
    if right.lengths:
        assert tuple(e.length for e in episodes) == right.lengths
    if right.texts:
        assert tuple({0: e.instruction, **e.later_instructions} for e in episodes) == right.texts
    if right.dims is not None:
        assert (manifest.action_dim, manifest.original_action_dim, manifest.proprio_dim) == right.dims
    assert [word for word in right.notes if not any(word in note for note in manifest.notes)] == [], manifest.notes
    assert [word for word in right.silent if any(word in note for note in manifest.notes)] == [], manifest.notes
    assert [word for word in right.skipped if not any(word in said for said in manifest.skipped)] == [], (
        manifest.skipped
    )
    assert bool(right.skipped) == bool(manifest.skipped)
    if right.values is not None:
        right.values(read(tmp_path / "out", "train", manifest.cameras[0]))
    report = check(str(tmp_path / "out"), against=CASES / name, quiet=True, processes=1)
    assert [f for f in report.findings if f.severity == "error" or f.check in ("source", "action")] == []


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    for folder in ("set", "elsewhere"):
        (tmp_path / folder).mkdir()
        shutil.copy(CASES / "mixed_suffixes/b.mp4", tmp_path / folder / f"{folder}.mp4")
    (tmp_path / "set/kitchen").symlink_to("../elsewhere")
    (tmp_path / "elsewhere/again").symlink_to("../set")
    manifest, _ = convert("video", tmp_path / "set", tmp_path / "out", size=32, val_fraction=0, quiet=True)
    assert manifest.splits["train"].episodes == 2


def test_pictures_of_a_turned_libero_set_are_the_hdf5s(tmp_path: Path, sample_data: Callable[[str], Path]) -> None:
    """The same frames from LIBERO's own HDF5, which openpi's script turned by 180°; mirrored they are 46 levels away."""
    real = sample_data("libero_spatial_task2_128.hdf5")
    common: dict[str, Any] = {"size": 32, "val_fraction": 0.0, "processes": 1, "quiet": True}
    convert("libero", real, tmp_path / "hdf5", options={"image_timing": "before"}, **common)
    options = parse_options("lerobot", LIBERO.split())
    convert("lerobot", CASES / "lerobot_libero_rotated", tmp_path / "turned", options=options, **common)
    ours, theirs = ({(s["episode"], s["t"]): simplejpeg.decode_jpeg(s["image"]).astype(int) for s in read(tmp_path / n, "train", c)}
                    for n, c in (("turned", "image"), ("hdf5", "agentview")))  # fmt: skip
    first = [ours["episode_000000", t] for t in range(12)]
    same = [
        min(np.abs(image - other).mean() for (_, at), other in theirs.items() if at == t)
        for t, image in enumerate(first)
    ]
    assert max(same) < 3
