"""LeRobot's relatives and faults in their metadata: read as they mean it, or refused by file and field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from films import film, number, picture

from data_tools.convert.plan import Settings, make_plan
from data_tools.formats.lerobot import LerobotReader
from stamo_dist.errors import DataError

N = 6
CAMERA = "observation.images.front"


def dataset(
    root: Path,
    *,
    info: dict[str, Any] | None = None,
    columns: dict[str, Any] | None = None,
    tasks: Any = ("wave",),
    frames: int = N,
    texts: tuple[str, ...] = ("wave", "bow", "valid"),
    vectors: dict[str, int] | None = None,
) -> Path:
    """A v2.1 dataset of one episode at 10 fps; frame t shows t, and vectors hold 10 t + dimension."""
    vectors = vectors or {"action": 3, "observation.state": 2}
    features: dict[str, Any] = {name: {"dtype": "float32", "shape": [size]} for name, size in vectors.items()}
    features[CAMERA] = {"dtype": "video", "shape": [64, 64, 3]}
    table: dict[str, Any] = {
        name: pa.array((10.0 * np.arange(N)[:, None] + np.arange(size)).tolist(), pa.list_(pa.float32()))
        for name, size in vectors.items()
    }
    table |= {"timestamp": np.arange(N, dtype=np.float32) / np.float32(10), "frame_index": np.arange(N)}
    table |= {"episode_index": np.zeros(N, np.int64), "task_index": np.zeros(N, np.int64)} | (columns or {})
    features |= {name: {"dtype": "int64", "shape": [1]} for name in table if name not in features}
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(
        pa.table({k: v for k, v in table.items() if v is not None}), root / "data/chunk-000/episode_000000.parquet"
    )
    film(root / f"videos/chunk-000/{CAMERA}/episode_000000.mp4", frames, rate=10)
    (root / "meta/info.json").write_text(json.dumps({"fps": 10, "features": features} | (info or {})))
    lines(root / "meta/tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(texts)])
    lines(root / "meta/episodes.jsonl", [{"episode_index": 0, "tasks": tasks, "length": N}])
    return root


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def shown(reader: LerobotReader) -> list[int]:
    scan = reader.scan()
    data = reader.read(scan.episodes[0])
    return [number(np.asarray(image)) for image in data.frames[scan.cameras[0]](range(len(data.times)))]


def test_as_many_frames_as_rows_are_paired_by_order_whatever_the_clock_says(tmp_path: Path) -> None:
    stamps = np.float32(0.093) * np.arange(N, dtype=np.float32)
    clock = LerobotReader(dataset(tmp_path / "a", columns={"timestamp": stamps}))
    assert shown(clock) == list(range(N))
    note, rate = clock.scan().notes
    assert "fps: 10, but the timestamps of episode_000000.parquet are 0.093 s apart" in rate
    assert note.startswith("times: 1 of 1 episodes have timestamps off the 10 Hz grid, by up to 0.035 s (episode 0)")
    assert LerobotReader(dataset(tmp_path / "on")).scan().notes == []
    assert shown(LerobotReader(dataset(tmp_path / "b", frames=N + 2))) == list(range(N))
    off = LerobotReader(dataset(tmp_path / "c", frames=N + 2, columns={"timestamp": stamps}))
    with pytest.raises(DataError, match=r"has 8 frames for 6 rows, and \d rows have no frame at their time, the first"):
        off.read(off.scan().episodes[0])


def test_one_missing_last_frame_costs_one_row(tmp_path: Path) -> None:
    reader = LerobotReader(dataset(tmp_path / "set", frames=N - 1))
    scan = reader.scan()
    (note,) = scan.notes
    assert note.startswith("episode_000000: its last row is left out")
    assert scan.episodes[0].length == N - 1
    assert shown(reader) == list(range(N - 1))
    assert reader.read(scan.episodes[0]).actions[:, 0].tolist() == [0, 10, 20, 30, 40]


def shared_file(root: Path, windows: list[tuple[Any, Any]]) -> Path:
    """The same as v3.0, with an episode of N rows in each of these windows of a file with 2 N frames."""
    dataset(root, frames=2 * N)
    (root / "meta/episodes.jsonl").unlink()
    row = pq.read_table(root / "data/chunk-000/episode_000000.parquet")
    at = row.column_names.index("episode_index")
    parts = [row.set_column(at, "episode_index", pa.array([e] * N)) for e in range(len(windows))]
    pq.write_table(pa.concat_tables(parts), root / "data/chunk-000/file-000.parquet")
    (root / "data/chunk-000/episode_000000.parquet").unlink()
    (root / f"videos/{CAMERA}/chunk-000").mkdir(parents=True)
    video = root / f"videos/chunk-000/{CAMERA}/episode_000000.mp4"
    video.rename(root / f"videos/{CAMERA}/chunk-000/file-000.mp4")
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    key = f"videos/{CAMERA}"
    table = [
        {"episode_index": e, "length": N, "data/chunk_index": 0, "data/file_index": 0, f"{key}/chunk_index": 0}
        | {f"{key}/file_index": 0, f"{key}/from_timestamp": begin, f"{key}/to_timestamp": end}
        for e, (begin, end) in enumerate(windows)
    ]
    pq.write_table(pa.Table.from_pylist(table), root / "meta/episodes/chunk-000/file-000.parquet")
    return root


@pytest.mark.parametrize(
    ("second", "reasons"),
    [
        ((0.6, 1.2), []),
        ((0.3, 0.9), ["000000: .*windows overlap: episode 0 ends at 0.6 s", "000001: .*overlap.* begins at 0.3 s"]),
        ((1.2, 0.6), ["000001: .*window is 1.2 s to 0.6 s, which is no stretch of time"]),
        ((0.6, 1.0), ["000001: .*4.0 frames at 10 fps, but it has 6 rows"]),
        ((0.9, 1.5), ["000001: .*window is 0.9 s to 1.5 s, but file-000.mp4 ends at 1.20 s"]),
        ((None, None), ["000001: .*row 1, videos/observation.images.front/from_timestamp: must be a number"]),
    ],
)
def test_windows_are_checked_when_scanned(tmp_path: Path, second: Any, reasons: list[str]) -> None:
    reader = LerobotReader(shared_file(tmp_path / "set", [(0.0, 0.6), second]))
    scan = reader.scan()
    assert len(scan.bad) == len(reasons)
    for fault, reason in zip(scan.bad, reasons, strict=True):
        with pytest.raises(DataError, match=reason):
            raise DataError(fault)
    if not reasons:
        images = reader.read(scan.episodes[1]).frames["front"](range(N))
        assert [number(np.asarray(image)) for image in images] == list(range(N, 2 * N))
        assert [e.instruction for e in scan.episodes] == ["wave", "wave"]  # no tasks column: by the rows


def test_actions_and_states_are_found_joined_and_sliced(tmp_path: Path) -> None:
    found = LerobotReader(dataset(tmp_path / "openpi", vectors={"actions": 2, "state": 1}))
    scan = found.scan()
    assert scan.notes == ["action: taken from the feature actions", "state: taken from the feature state"]
    split = dataset(tmp_path / "split", vectors={"action.arm": 2, "action.hand": 1, "observation.state": 1})
    with pytest.raises(DataError, match=r"--set action=action\.arm,action\.hand, or --set action=none"):
        LerobotReader(split).scan()
    joined = LerobotReader(split, action=["action.hand", "action.arm"], state=["none"])
    data = joined.read(joined.scan().episodes[0])
    assert (data.actions[1].tolist(), data.proprio.shape) == ([10, 10, 11], (N, 0))
    for wrong in ({"action": ["action.arn"]}, {"instruction": "task_indx"}):
        with pytest.raises(DataError, match=r"did you mean (action\.arm|task_index)\?"):
            LerobotReader(split, **wrong).scan()  # type: ignore[arg-type]
    groot = dataset(tmp_path / "groot", columns={"frame_index": None})
    (groot / "meta/modality.json").write_text(json.dumps({"action": {"hand": {"start": 1, "end": 3}}}))
    sliced = LerobotReader(groot, action=["hand"])
    assert sliced.read(sliced.scan().episodes[0]).actions[2].tolist() == [21, 22]


@pytest.mark.parametrize(
    ("tasks", "columns", "text", "each"),
    [
        ("wave", {}, "wave", None),
        (["wave", "valid"], {}, "wave", None),
        (None, {"task_index": np.ones(N, np.int64)}, "bow", None),
        (["wave", "bow"], {"task_index": np.arange(N) // 3}, "wave", ["wave"] * 3 + ["bow"] * 3),
        (["x", "bow"], {"annotation.human.action.task_description": np.ones(N, np.int64)}, "bow", None),
        ([0], {name: [[0]] * N for name in ("task_index", "episode_index")}, "wave", None),
        ("wave\u2028twice", {"task_index": np.full(N, 3)}, "wave\u2028twice", None),
        ("wave", {"task_index": None}, "wave", None),
    ],
)  # fmt: skip
def test_instructions(tmp_path: Path, tasks: Any, columns: Any, text: str, each: list[str] | None) -> None:
    texts = ("wave", "bow", "valid", "wave\u2028twice")
    reader = LerobotReader(dataset(tmp_path / "set", tasks=tasks, columns=columns, texts=texts))
    (episode,) = reader.scan().episodes
    assert episode.instruction == text
    assert reader.read(episode).instructions == each
    assert not any(note.startswith("instructions: ") for note in reader.scan().notes)


def test_where_rows_and_table_differ_the_rows_win_and_it_is_said(tmp_path: Path) -> None:
    root = dataset(tmp_path / "set", tasks=["bow"])
    scan = LerobotReader(root).scan()
    assert scan.episodes[0].instruction == "wave"
    (note,) = scan.notes
    assert note.startswith("instructions: 1 of 1 episodes have others in their rows than in the episode table")
    for part in ("episode 0: 'wave'", "table: 'bow'", "--set instruction=none"):
        assert part in note
    table = LerobotReader(root, instruction="none").scan()
    assert (table.episodes[0].instruction, table.notes) == ("bow", [])


def test_a_row_whose_task_is_in_no_table_costs_its_episode(tmp_path: Path) -> None:
    scan = LerobotReader(dataset(tmp_path / "set", columns={"task_index": np.full(N, 9)})).scan()
    assert scan.bad == ["episode_000000: task_index: 9 is no task_index of meta/tasks"]


def test_an_episode_without_the_column_that_says_its_instructions_is_named(tmp_path: Path) -> None:
    """The table is no stand-in where other files have the column, nor where it has several."""
    column = "annotation.human.action.task_description"
    root = dataset(tmp_path / "set", tasks=["wave"], columns={column: np.ones(N, np.int64)})
    add_episode(root, without=column)
    scan = LerobotReader(root).scan()
    assert [e.instruction for e in scan.episodes] == ["bow"]
    assert scan.bad == [f"episode_000001: episode_000001.parquet: has no column {column}"]
    everywhere = LerobotReader(dataset(tmp_path / "everywhere", tasks=["wave"], columns={column: None})).scan()
    assert everywhere.episodes[0].instruction == "wave"
    assert everywhere.notes == [f"instructions: no file has a column {column}; the episode table's are taken"]
    nulls = LerobotReader(dataset(tmp_path / "nulls", tasks=["wave"], columns={column: pa.nulls(N, pa.int64())})).scan()
    assert nulls.episodes[0].instruction == "wave"
    assert nulls.notes == [
        "instructions: 1 of 1 episodes have a column for them with nothing in it (episode 0); the episode table's are "
        "taken ('wave')"
    ]
    several = LerobotReader(dataset(tmp_path / "several", tasks=["wave", "bow"], columns={"task_index": None})).scan()
    assert several.bad == ["episode_000000: no column task_index says which rows have which of 'wave, bow'"]


def add_episode(root: Path, *, without: str) -> None:
    """A second episode, the first one's copy but for one column."""
    rows = pq.read_table(root / "data/chunk-000/episode_000000.parquet").drop_columns([without])
    numbered = rows.set_column(rows.schema.get_field_index("episode_index"), "episode_index", pa.array([1] * len(rows)))
    pq.write_table(numbered, root / "data/chunk-000/episode_000001.parquet")
    videos = root / f"videos/chunk-000/{CAMERA}"
    shutil.copy(videos / "episode_000000.mp4", videos / "episode_000001.mp4")
    lines(root / "meta/episodes.jsonl", [{"episode_index": i, "tasks": ["wave"], "length": N} for i in range(2)])


def test_records_are_read_field_after_field(tmp_path: Path) -> None:
    """AgiBot's kinds, nested instead of dotted."""
    arm = [{"joint": {"position": [10.0 * t, 10.0 * t + 1]}, "effector": 10.0 * t + 2} for t in range(N)]
    root = dataset(tmp_path / "set", vectors={"observation.state": 2}, columns={"actions": arm})
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["actions"] = {"dtype": "float32", "shape": [3]}
    path.write_text(json.dumps(info))
    reader = LerobotReader(root)
    assert reader.read(reader.scan().episodes[0]).actions[2].tolist() == [20, 21, 22]
    info["features"]["actions"]["shape"] = [4]
    path.write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"3 numbers a frame \(joint\.position 2, effector 1\); info\.json says 4"):
        reader.read(reader.scan().episodes[0])


def test_videos_of_high_dynamic_range_are_said(tmp_path: Path) -> None:
    root = dataset(tmp_path / "set")
    film(root / f"videos/chunk-000/{CAMERA}/episode_000000.mp4", N, rate=10, transfer=16)
    (note,) = LerobotReader(root).scan().notes
    assert note.startswith("colours: 1 of 1 videos are HDR (PQ)")
    assert f"videos/chunk-000/{CAMERA}/episode_000000.mp4; map" in note


def test_episodes_without_instruction_are_counted(tmp_path: Path) -> None:
    scan = LerobotReader(dataset(tmp_path / "set", tasks=None, texts=())).scan()
    assert scan.notes == ["1 of 1 episodes have no instruction; give them with --instructions FILE.csv"]


def test_images_turned_by_their_makers_come_out_upright(tmp_path: Path) -> None:
    root = dataset(tmp_path / "set", vectors={"actions": 7, "state": 8})
    text = (root / "meta/info.json").read_text()
    (root / "meta/info.json").write_text(text.replace(CAMERA, "image"))
    video = root / f"videos/chunk-000/{CAMERA}/episode_000000.mp4"
    film(root / "videos/chunk-000/image/episode_000000.mp4", [picture(t)[:, ::-1] for t in range(N)], rate=10)
    video.unlink()
    reader = LerobotReader(root, action_kind="libero")
    assert shown(reader) == list(range(N))
    assert any(note.startswith("images: mirrored back") for note in reader.scan().notes)
    stated = LerobotReader(root, mode="delta", rotation="rotvec", gripper="-1,1", image_orientation="mirrored")
    spec = stated.scan().action
    assert spec is not None
    assert (spec.mode, spec.gripper, spec.gripper_open, shown(stated)) == ("delta", 6, -1, list(range(N)))


def test_unstated_actions_are_not_thinned(tmp_path: Path) -> None:
    root = dataset(tmp_path / "set", vectors={"action": 7})
    with pytest.raises(DataError, match=r"rate: 5 Hz leaves out frames of 10 Hz.*--set action_kind=other"):
        make_plan("lerobot", root, "set", Settings(rate_hz=5.0))
    for fine in (Settings(), Settings(rate_hz=5.0, options={"action_kind": "other"})):
        assert make_plan("lerobot", root, "set", fine).manifest.action_dim == 7


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("info.json", '"fps": 10', '"fps": null', r"info\.json, fps: must be a positive number .* not null"),
        ("info.json", '"fps": 10', '"fps": "10"', ""),
        ("info.json", '"shape": [3]', '"names": null', r"info\.json, features\.action\.shape: must be a list"),
        ("episodes.jsonl", "wave", "caf\xe9", r"episodes\.jsonl, line 1: not UTF-8 \(byte 0xe9\)"),
        ("episodes.jsonl", '"length": 6', '"length": [1, 2]', r"line 1, length: must be a whole number, not \[1, 2\]"),
        ("tasks.jsonl", '{"task_index"', "version https://git-lfs", r"tasks\.jsonl: a Git LFS pointer.*`git lfs pull`"),
    ],
)
def test_metadata_faults_name_file_and_field(tmp_path: Path, file: str, old: str, new: str, reason: str) -> None:
    path = dataset(tmp_path / "set") / "meta" / file
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new).encode("latin1"))
    if not reason:
        assert LerobotReader(tmp_path / "set").scan().rate_hz == 10
        return
    with pytest.raises(DataError, match=reason):
        LerobotReader(tmp_path / "set").scan()


@pytest.mark.parametrize("case", ["v30_overlap", "hardware_times", "img_binary", "video_one_short"])
def test_cases_scan_without_a_traceback(case: str) -> None:
    reader = LerobotReader(Path(__file__).parent / "cases" / case)
    scan = reader.scan()
    assert bool(scan.bad) == (case == "v30_overlap")
    for episode in scan.episodes:
        assert len(reader.read(episode).times) == episode.length
