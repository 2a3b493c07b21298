"""Folders of videos, their segments by timestamp, and the layouts of public human-video datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from films import cut, film, number

from data_tools.convert.driver import convert
from data_tools.formats.source import EpisodeRef
from data_tools.formats.video import VideoReader
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError


def shown(reader: VideoReader, episode: EpisodeRef) -> list[int]:
    """Numbers of all frames of an episode."""
    data = reader.read(episode)
    assert data.actions.shape == data.proprio.shape == (len(data.times), 0)
    (frames,) = data.frames.values()
    return [number(image) for image in frames(range(len(data.times)))]


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_folder_of_mixed_videos(tmp_path: Path) -> None:
    film(tmp_path / "raw/a.mp4", 20, rate=30, b_frames=2)
    film(tmp_path / "raw/deep/b.webm", 24, codec="libvpx-vp9", rate=24)
    film(tmp_path / "raw/deep/C.AVI", 30, codec="mpeg4", rate=60)
    film(tmp_path / "raw/.trash/d.mp4", 20)
    labels = put(tmp_path / "labels.json", [{"video": "b", "label": "pour tea"}, {"id": "deep/C.AVI", "text": "cut"}])
    reader = VideoReader(tmp_path / "raw", labels=labels)
    scan = reader.scan()
    assert [(e.id, e.length, e.instruction) for e in scan.episodes] == [
        ("a.mp4", 20, ""), ("deep/C.AVI", 30, "cut"), ("deep/b.webm", 24, "pour tea"),
    ]  # fmt: skip
    assert (scan.cameras, scan.action, scan.proprio_dim, scan.rate_hz) == (["video"], None, 0, 30)
    assert scan.options["rates_hz"] == {"min": 24, "median": 30, "max": 60}
    for episode in scan.episodes:
        assert shown(reader, episode) == list(range(episode.length))
    put(labels, {"e": "fly", "b": "pour tea"})
    with pytest.raises(DataError, match=r"labels\.json: labels of 1 unknown videos:\n  - e: no such video"):
        reader.scan()


def test_linked_folders_are_followed_once_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    film(tmp_path / "elsewhere/a.mp4", 20)
    film(tmp_path / "raw/y/b.mp4", 24)
    film(tmp_path / "raw/one.mp4", 1)
    (tmp_path / "raw/kitchen").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "raw")  # a cycle
    (tmp_path / "raw/alias").symlink_to("y")  # there already, by its own name
    for name in ("c.GIF", "d.mpg", "e.mpg"):
        put(tmp_path / "raw" / name, "x")
    scan = VideoReader(tmp_path / "raw").scan()
    assert [(e.id, e.length) for e in scan.episodes] == [("kitchen/a.mp4", 20), ("y/b.mp4", 24)]
    assert scan.notes == [
        "left out: 1 .gif, 2 .mpg (read are .mp4, .webm, .mkv, .avi, .mov; convert them, e.g. with ffmpeg)",
        "left out: 1 shorter than 2 frames (--set min_frames=1 takes them): one.mp4",
    ]
    assert [e.id for e in VideoReader(tmp_path / "raw", min_frames=1).scan().episodes][-2:] == ["one.mp4", "y/b.mp4"]


def test_videos_that_are_not_there_yet_are_named(tmp_path: Path) -> None:
    film(tmp_path / "raw/a.mp4", 20)
    put(tmp_path / "raw/b.mp4", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=r"b\.mp4: a Git LFS pointer.*run `git lfs pull`"):
        VideoReader(tmp_path / "raw").scan()
    (tmp_path / "raw/b.mp4").unlink()
    (tmp_path / "raw/b.mp4").symlink_to("../blobs/b")
    with pytest.raises(DataError, match=r"b\.mp4: a link to \.\./blobs/b, which is not there"):
        VideoReader(tmp_path / "raw").scan()


SEGMENTS = """video,start,end,text,id,split,subject
a.mp4,00:00:00.5,1.0,lift the cup,first,train,7
deep/b,0.25,,drop it,,val,
b.mp4,,0:00.1,,,,
"""


def test_segments_by_timestamp(tmp_path: Path) -> None:
    film(tmp_path / "raw/a.mp4", 40, b_frames=2)
    film(tmp_path / "raw/deep/b.mp4", 20, rate=20)
    reader = VideoReader(tmp_path / "raw", segments=[put(tmp_path / "cuts.csv", SEGMENTS)])
    scan = reader.scan()
    assert [(e.id, e.length, e.instruction, e.split) for e in scan.episodes] == [
        ("first", 15, "lift the cup", "train"),
        ("deep/b.mp4@0.250", 15, "drop it", "val"),
        ("deep/b.mp4@0.000", 2, "", ""),
    ]
    assert scan.episodes[0].meta == {"subject": "7", "video": "a.mp4", "start": 0.5, "end": 1.0}
    assert [shown(reader, e) for e in scan.episodes] == [[*range(15, 30)], [*range(5, 20)], [0, 1]]

    rows = {"a.mp4": [{"start": 0.1, "end": 0.2, "text": "x"}, {"start": "0:00.2", "end": 0.5}]}
    reader = VideoReader(tmp_path / "raw", segments=[put(tmp_path / "cuts.json", rows)], min_frames=5)
    scan = reader.scan()
    assert [shown(reader, e) for e in scan.episodes] == [[*range(6, 15)]]
    assert scan.options["left_out_as_too_short"] == 1


def test_all_wrong_rows_are_named_at_once(tmp_path: Path) -> None:
    for name in ("a.mp4", "x/b.mp4", "y/b.mp4"):
        film(tmp_path / "raw" / name, 30)
    rows = ["a.mp4,0,0.5", "a.mp4,0.7,0.3", "c.mp4,0,1", "a.mp4,0.2,9", "a.mp4,now,1", "b,0,1", ",0,1", "a.mp4,0:61,1",
            "a.mp4,3,", "a.mp4,-1,1"]  # fmt: skip
    table = put(tmp_path / "cuts.csv", "\n".join(["video,start,end", *rows]))
    with pytest.raises(DataError) as caught:
        VideoReader(tmp_path / "raw", segments=[table]).scan()
    assert str(caught.value).splitlines() == [
        "9 of 10 segments cannot be used:",
        "  - cuts.csv row 3: start 0.7 is not before end 0.3",
        "  - cuts.csv row 4: c.mp4: no such video in this folder",
        "  - cuts.csv row 5: 0.2 s to 9 s is beyond the video's end at 1.00 s",
        "  - cuts.csv row 6: start 'now' is neither seconds nor HH:MM:SS.mmm",
        "  - cuts.csv row 7: b may be any of x/b.mp4, y/b.mp4; give its path",
        "  - cuts.csv row 8: no video",
        "  - cuts.csv row 9: start '0:61' is neither seconds nor HH:MM:SS.mmm",
        "  - cuts.csv row 10: 3 s to its end is beyond the video's end at 1.00 s",
        "  - cuts.csv row 11: start '-1' is neither seconds nor HH:MM:SS.mmm",
    ]
    with pytest.raises(DataError, match=r"no column video; a table of segments has the columns"):
        VideoReader(tmp_path / "raw", segments=[put(tmp_path / "bad.csv", "clip,from\na,1\n")]).scan()
    with pytest.raises(DataError, match=r"preset: 'ssv3' must be one of ssv2, epic[\s\S]*window: 0 must be positive"):
        VideoReader(tmp_path / "raw", preset="ssv3", window=0).scan()  # type: ignore[arg-type]


def test_broken_videos_are_bad_episodes_and_the_rest_is_converted(tmp_path: Path) -> None:
    film(tmp_path / "raw/a.mp4", 30)
    cut(film(tmp_path / "raw/b.mp4", 30), 0.6)
    cut(film(tmp_path / "raw/c.webm", 90, codec="libvpx-vp9"), 0.6)
    cut(film(tmp_path / "raw/d.mp4", 30, container_options={"movflags": "faststart"}), 0.9)
    film(tmp_path / "raw/e.mp4", 30, rotation=(90, False, False))
    manifest, _ = convert("video", tmp_path / "raw", tmp_path / "out", size=32, val_fraction=0, quiet=True)
    assert [e.id for e in read_episodes(tmp_path / "out", "train")] == ["a.mp4", "e.mp4"]
    names = ["b.mp4: b.mp4: truncated or corrupt", "c.webm: c.webm: truncated", "d.mp4: d.mp4: truncated"]
    assert len(manifest.skipped) == 3
    assert all(found.startswith(name) for found, name in zip(manifest.skipped, names, strict=True))
    assert (manifest.action_dim, manifest.proprio_dim) == (0, 0)


def test_real_videos_to_shards(tmp_path: Path, sample_data: Callable[[str], Path]) -> None:
    """A hand that moves a box and a cup; box.mp4 lost its presentation times."""
    table = put(tmp_path / "cuts.csv", "video,start,end,text\nbox,2,4,move the box\ncup,1,3,move the cup\n")
    manifest, _ = convert(
        "video", sample_data("human_video"), tmp_path / "out", size=32, rate_hz=10.0, val_fraction=0, quiet=True,
        options={"segments": [table]},
    )  # fmt: skip
    assert [(e.length, e.instruction) for e in read_episodes(tmp_path / "out", "train")] == [
        (20, "move the box"), (20, "move the cup"),
    ]  # fmt: skip
    assert manifest.skipped == []


def test_videos_of_high_dynamic_range_are_counted(tmp_path: Path) -> None:
    for name, transfer in (("a.mp4", 16), ("b.mkv", 18), ("c.mp4", None), ("d.mp4", 14)):
        film(tmp_path / "set" / name, 3, transfer=transfer)
    notes = VideoReader(tmp_path / "set").scan().notes
    (note,) = (n for n in notes if n.startswith("colours: "))
    assert note.startswith("colours: 2 of 4 videos are HDR (HLG, PQ), read as they are stored")
    assert ": a.mp4, b.mkv; map them" in note
    film(tmp_path / "usual/c.mp4", 3)
    assert not [n for n in VideoReader(tmp_path / "usual").scan().notes if n.startswith("colours: ")]


def test_ssv2(tmp_path: Path) -> None:
    for name in ("74225", "116154", "9"):
        film(tmp_path / f"20bn-something-something-v2/{name}.webm", 12, codec="libvpx-vp9", rate=12)
    labels = tmp_path / "labels"
    put(labels / "something-something-v2-labels.json", {"Spinning [something]": "1"})
    put(labels / "something-something-v2-train.json", [
        {"id": "74225", "label": "spinning cube", "template": "Spinning [something]", "placeholders": ["cube"]},
        {"id": "555", "label": "never downloaded", "template": "", "placeholders": []},
    ])  # fmt: skip
    put(labels / "something-something-v2-validation.json", [
        {"id": "116154", "template": "Putting [something] on [a box]", "placeholders": ["a cup", "a tray"]},
    ])  # fmt: skip
    put(labels / "something-something-v2-test.json", [{"id": "9"}])
    reader = VideoReader(tmp_path, preset="ssv2")
    scan = reader.scan()
    assert sorted((e.id, e.instruction, e.task, e.split) for e in scan.episodes) == [
        ("116154", "Putting a cup on a tray", "Putting something on a box", "val"),
        ("74225", "spinning cube", "Spinning something", "train"),
        ("9", "", "", "test"),
    ]
    assert scan.options["left_out_as_video_not_there"] == 1
    assert shown(reader, scan.episodes[0]) == list(range(12))


EPIC = """narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,\
stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes
P01_102_0,P01,P01_102,00:00:00.40,00:00:00.50,00:00:01.00,27,111,take knife and plate,take,0,knife,4,"['knife']",[4]
P01_103_0,P01,P01_103,00:00:00.40,00:00:00.50,00:00:09.00,27,111,open door,open,3,door,8,['door'],[8]
P02_01_0,P02,P02_01,00:00:00.40,00:00:00.50,00:00:01.00,27,111,close tap,close,4,tap,0,['tap'],[0]
P01_102_1,P01,P01_102,00:00:00.40,00:00:08.50,00:00:09.00,27,111,late,take,0,knife,4,['knife'],[4]
"""


def test_epic_goes_by_timestamps_at_mixed_rates(tmp_path: Path) -> None:
    film(tmp_path / "EPIC-KITCHENS/P01/videos/P01_102.MP4", 60, rate=50)
    film(tmp_path / "EPIC-KITCHENS/P01/videos/P01_103.MP4", 60, rate=60)
    put(tmp_path / "annotations/EPIC_100_train.csv", EPIC)
    put(tmp_path / "annotations/EPIC_100_verb_classes.csv", "id,key\n0,take\n")
    reader = VideoReader(tmp_path, preset="epic")
    scan = reader.scan()
    assert [(e.id, e.instruction, e.task, e.split) for e in scan.episodes] == [
        ("P01_102_0", "take knife and plate", "take knife", "train"), ("P01_103_0", "open door", "open door", "train"),
    ]  # fmt: skip
    assert [shown(reader, e) for e in scan.episodes] == [[*range(25, 50)], [*range(30, 60)]]
    assert "start_frame" not in scan.episodes[0].meta
    assert scan.episodes[0].meta["participant_id"] == "P01"
    assert scan.bad == ["P01_102_1: 8.5 s to 9 s is beyond the video's end at 1.20 s"]
    assert (scan.rate_hz, scan.options["left_out_as_video_not_there"]) == (55, 1)


def pose(path: Path, **attrs: str) -> None:
    with h5py.File(path, "w") as file:
        file["transforms/camera"] = np.zeros((12, 4, 4), np.float32)
        file.attrs.update(attrs)


def test_egodex(tmp_path: Path) -> None:
    for name in ("part1/add_remove_lid/0", "part1/add_remove_lid/1", "part1/stack/0", "test/stack/0"):
        film(tmp_path / f"{name}.mp4", 12)
    two = {"llm_type": "reversible", "llm_description": "Put the lid on.", "llm_description2": "Take the lid off."}
    pose(tmp_path / "part1/add_remove_lid/0.hdf5", **two, which_llm_description="1")
    pose(tmp_path / "part1/add_remove_lid/1.hdf5", **two, which_llm_description="2")
    pose(tmp_path / "test/stack/0.hdf5", llm_description="Stack cups.")
    pose(tmp_path / "part1/stack/0.hdf5")
    cut(tmp_path / "part1/stack/0.hdf5", 0.3)
    scan = VideoReader(tmp_path, preset="egodex").scan()
    assert [(e.id, e.instruction, e.task, e.split) for e in scan.episodes] == [
        ("part1/add_remove_lid/0", "Put the lid on.", "add_remove_lid", "train"),
        ("part1/add_remove_lid/1", "Take the lid off.", "add_remove_lid", "train"),
        ("test/stack/0", "Stack cups.", "stack", "test"),
    ]
    (bad,) = scan.bad
    assert bad.startswith("part1/stack/0: 0.hdf5: not a whole HDF5 file")


def take(name: str, uid: str) -> dict[str, Any]:
    def stream(cam: str, id: str) -> dict[str, str]:
        return {"relative_path": f"frame_aligned_videos/{cam}{'' if id == '0' else f'_{id}'}.mp4"}

    return {
        "take_name": name, "take_uid": uid, "root_dir": f"takes/{name}", "task_name": "Remove a Wheel",
        "parent_task_name": "Bike Repair", "university_name": "cmu", "best_exo": "cam02",
        "frame_aligned_videos": {
            "aria01": {"slam-left": stream("aria01", "1201-1"), "rgb": stream("aria01", "214-1")},
            "cam01": {"0": stream("cam01", "0")}, "cam02": {"0": stream("cam02", "0")},
            "collage": {"0": {"relative_path": "ego_preview.mp4"}}, "best_exo": {"0": {"relative_path": None}},
        },
    }  # fmt: skip


def test_egoexo4d(tmp_path: Path) -> None:
    put(tmp_path / "takes.json", [take("cmu_bike14_4", "u1"), take("cmu_bike14_5", "u2"), take("far_away", "u3")])
    videos = tmp_path / "takes/cmu_bike14_4/frame_aligned_videos"
    for name, frames in (("aria01_1201-1", 9), ("aria01_214-1", 60), ("cam01", 11), ("cam02", 12)):
        film(videos / f"{name}.mp4", frames)
    film(tmp_path / "takes/cmu_bike14_5/frame_aligned_videos/downscaled/448/aria01_214-1.mp4", 20)
    scan = VideoReader(tmp_path, preset="egoexo4d").scan()
    assert [(e.id, e.length, e.instruction, e.task) for e in scan.episodes] == [
        ("cmu_bike14_4", 60, "Remove a Wheel", "Bike Repair"), ("cmu_bike14_5", 20, "Remove a Wheel", "Bike Repair"),
    ]  # fmt: skip
    assert (scan.cameras, scan.options["left_out_as_video_not_there"]) == (["ego"], 1)
    for camera, frames in (("exo", 12), ("cam01", 11)):
        scan = VideoReader(tmp_path, preset="egoexo4d", cameras=[camera]).scan()
        assert (scan.cameras, [e.length for e in scan.episodes]) == ([camera], [frames])

    steps = {"annotations": {"u1": {"segments": [
        {"start_time": 0.5, "end_time": 1.0, "step_name": "Wheel", "step_description": "Take the wheel off"},
    ]}}}  # fmt: skip
    keystep = put(tmp_path / "annotations/keystep_val.json", steps)
    reader = VideoReader(tmp_path, preset="egoexo4d", segments=[keystep])
    (episode,) = reader.scan().episodes
    assert (episode.id, episode.instruction, episode.split) == ("cmu_bike14_4/0001", "Take the wheel off", "val")
    assert shown(reader, episode) == [*range(15, 30)]

    def said(text: str, time: float, visible: str = "1") -> dict[str, Any]:
        return {"text": text, "timestamp": time, "ego_visible": visible}

    atomic = put(tmp_path / "annotations/atomic_descriptions_train.json", {"annotations": {"u1": [
        {"rejected": True, "descriptions": [said("wrong", 1)]},
        {"rejected": False, "descriptions": [said("C grips", 1.0), said("C nods", 1.1, "0"), said("C pulls", 1.4)]},
    ]}})  # fmt: skip
    reader = VideoReader(tmp_path, preset="egoexo4d", segments=[atomic], window=1.0)
    scan = reader.scan()
    assert [(e.instruction, shown(reader, e)) for e in scan.episodes] == [
        ("C grips", [*range(15, 36)]), ("C pulls", [*range(36, 57)]),
    ]  # fmt: skip


UID = "001e3e4e-2743-47fc-8564-d5efd11f9e90"


def test_ego4d(tmp_path: Path) -> None:
    film(tmp_path / f"v2/full_scale/{UID}.mp4", 60)
    reader = VideoReader(tmp_path, preset="ego4d")
    assert [(e.id, e.length) for e in reader.scan().episodes] == [(UID, 60)]

    def told(text: str, time: float) -> dict[str, Any]:
        return {"timestamp_sec": time, "timestamp_frame": 0, "narration_text": text, "annotation_uid": "x"}

    passes = {
        "narration_pass_1": {
            "narrations": [told("#C C lifts a bag #unsure", 0.2), told("#C C opens it", 0.8), told("#O A waves", 1.9)],
            "summaries": [{"start_sec": 0, "end_sec": 2, "summary_text": "C packs"}],
        },
        "narration_pass_2": {"narrations": [told("#C C again", 0.3)]},
    }
    put(tmp_path / "v2/annotations/narration.json", {UID: passes, UID[::-1]: {"status": "redacted"}})
    reader = VideoReader(tmp_path, preset="ego4d", window=1.0)
    assert [(e.instruction, shown(reader, e)) for e in reader.scan().episodes] == [
        ("C lifts a bag", [*range(15)]), ("C opens it", [*range(15, 39)]), ("A waves", [*range(42, 60)]),
    ]  # fmt: skip

    moments = {"videos": [{"video_uid": UID, "split": "train", "clips": [{
        "clip_uid": "c", "video_start_sec": 0.0, "video_end_sec": 2.0, "annotations": [{"labels": [
            {"start_time": 9, "end_time": 10, "video_start_time": 0.5, "video_end_time": 1.0, "label": "wash_hands"}]}],
    }]}]}  # fmt: skip
    main = {"videos": [{"video_uid": UID, "annotated_intervals": [{"start_sec": 0.0, "narrated_actions": [
        {"start_sec": 0.5, "end_sec": 1.0, "narration_text": "#C C cuts", "is_rejected": False},
        {"start_sec": 0.0, "end_sec": 1.0, "narration_text": "#C C naps", "is_rejected": True}]}]}]}  # fmt: skip
    steps = {"videos": [{"video_uid": UID, "start_time": 0.0, "end_time": 2.0, "goal_description": "Cook", "segments": [
        {"start_time": 0.5, "end_time": 1.0, "step_description": "boil", "segments": [
            {"start_time": 0.6, "end_time": 0.7, "step_description": "stir"}]}]}]}  # fmt: skip
    for name, content, text in (
        ("moments_train", moments, "wash_hands"), ("fho_main", main, "C cuts"), ("goalstep_val", steps, "boil"),
    ):  # fmt: skip
        file = put(tmp_path / f"{name}.json", content)
        reader = VideoReader(tmp_path, preset="ego4d", segments=[file])
        (episode,) = reader.scan().episodes
        assert (episode.instruction, shown(reader, episode)) == (text, [*range(15, 30)])
    with pytest.raises(DataError, match=r"no texts with times by video in it"):
        VideoReader(tmp_path, preset="ego4d", segments=[put(tmp_path / "x.json", {"videos": []})]).scan()


@pytest.mark.parametrize("preset", ["ssv2", "epic", "egoexo4d"])
def test_presets_say_which_annotations_they_miss(tmp_path: Path, preset: Any) -> None:
    film(tmp_path / "a.mp4", 5)
    with pytest.raises(DataError, match=r"no (something-something-v2-train|EPIC_100_train|takes)\.(json|csv)"):
        VideoReader(tmp_path, preset=preset).scan()
    put(tmp_path / "takes.json", [{"uid": 1}])
    bad = put(tmp_path / "EPIC_100_train.csv", "video_id,start_timestamp,stop_timestamp\nzz,1,2\n")
    given = None if preset == "egoexo4d" else [bad if preset == "epic" else tmp_path / "takes.json"]
    with pytest.raises(
        DataError, match=r"item 1, take_uid: must be a text|none of the 1 annotated videos|item 1 has no id"
    ):
        VideoReader(tmp_path, preset=preset, segments=given).scan()
