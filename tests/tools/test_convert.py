"""LIBERO's HDF5 layout into shards, on real files."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import simplejpeg

from data_tools.convert.driver import convert

from stamo_dist import _streaming  # noqa: F401  # isort: skip  must precede streaming
from streaming.base.format import MDSWriter, reader_from_json

from data_tools.convert.mds import EpisodeWriter
from stamo_dist.data.schema import columns, read_episodes, read_manifest
from stamo_dist.errors import DataError

REAL = "libero_spatial_task2_128.hdf5"
BEFORE = {"image_timing": "before"}


def shards(source: Path, split: str, camera: str) -> list[list[dict[str, Any]]]:
    """Every sample of every shard, read by mosaicml-streaming."""
    index = json.loads((source / split / camera / "index.json").read_text())
    readers = [reader_from_json(str(source / split), camera, shard) for shard in index["shards"]]
    return [[reader[i] for i in range(len(reader))] for reader in readers]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_real_file_comes_back(tmp_path: Path, sample_data: Callable[[str], Path]) -> None:
    """Actions and proprio exactly, pixels closely and upright, in the stored order, over several shards."""
    real = sample_data(REAL)
    limit = 200_000
    manifest, _ = convert(
        "libero", real, tmp_path / "out", size=128, val_fraction=0, shard_bytes=limit, options=BEFORE, quiet=True
    )
    assert manifest.cameras == ["agentview", "eye_in_hand"]
    assert (manifest.action_dim, manifest.proprio_dim, manifest.rate_hz) == (7, 8, 20.0)
    episodes = read_episodes(tmp_path / "out", "train")
    with h5py.File(real) as file:
        for camera in manifest.cameras:
            stored = shards(tmp_path / "out", "train", camera)
            assert len(stored) > 1
            homes = [{sample["episode"] for sample in shard} for shard in stored]
            assert sum(map(len, homes)) == len(set.union(*homes)), "an episode is split over shards"
            samples = [sample for shard in stored for sample in shard]
            for episode in episodes:
                demo = file["data"][episode.id.rsplit("/", 1)[1]]
                mine = samples[episode.start : episode.start + episode.length]
                assert [s["t"] for s in mine] == list(range(len(demo["actions"])))
                assert {(s["episode"], s["length"], s["camera"]) for s in mine} == {(episode.id, len(mine), camera)}
                np.testing.assert_array_equal([s["original_action"] for s in mine], np.float32(demo["actions"]))
                proprio = np.concatenate([demo["obs/ee_states"], demo["obs/gripper_states"]], axis=1)
                np.testing.assert_array_equal([s["proprio"] for s in mine], np.float32(proprio))
                upright = demo[f"obs/{camera}_rgb"][:][:, ::-1]
                for t in (0, len(mine) // 2, len(mine) - 1):
                    image = simplejpeg.decode_jpeg(mine[t]["image"])
                    assert psnr(image, upright[t]) > 34
                    frame = np.ascontiguousarray(upright[t])
                    assert mine[t]["image"] == simplejpeg.encode_jpeg(frame, 95, colorsubsampling="420"), "these pixels"
                    assert psnr(image, upright[t][::-1]) < 20
    assert {e.instruction for e in episodes} == {"pick up the black bowl from table center and place it on the plate"}
    for name, expected in manifest.checksums.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == expected


def test_an_episode_is_encoded_as_streaming_encodes_its_samples(tmp_path: Path) -> None:
    layout = columns(action=2, original_action=0, proprio=3)
    writer = EpisodeWriter(tmp_path / "out", layout, 1 << 20)
    shared = {"episode": "é", "length": 4, "instruction": "", "source": "s", "camera": "c", "convention": "x" * 300}
    each = {
        "t": np.arange(4),
        "time": np.arange(4) / 3,
        "image": [b"a", b"", b"abc", b"\0"],
        "action": np.arange(8, dtype=np.float32).reshape(4, 2),
        "proprio": np.ones((4, 3), np.float32),
    }
    samples = [{**shared, **{k: v[i] for k, v in each.items()}, "t": i} for i in range(4)]
    stock = [writer.encode_sample(sample) for sample in samples]
    assert writer.encode(shared, each) == stock
    writer.write_episode(stock)
    writer.finish()
    with MDSWriter(out=str(tmp_path / "stock"), columns=layout, hashes=["sha256"], size_limit=None) as streaming:
        for sample in samples:
            streaming.write(sample)
    for name in ("shard.00000.mds", "index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


def test_downscaled_frames_average_the_original(tmp_path: Path, cut: Callable[..., Path]) -> None:
    convert("libero", cut(tmp_path / "a.hdf5"), tmp_path / "out", size=64, val_fraction=0, quiet=True)
    sample = shards(tmp_path / "out", "train", "agentview")[0][3]
    with h5py.File(tmp_path / "a.hdf5") as file:
        big = file["data/demo_0/obs/agentview_rgb"][3][::-1].astype(float)
    assert psnr(simplejpeg.decode_jpeg(sample["image"]), big.reshape(64, 2, 64, 2, 3).mean((1, 3))) > 30


def test_official_files_pair_each_image_with_the_next_action(tmp_path: Path, cut: Callable[..., Path]) -> None:
    """LIBERO's own files store the image after actions[t]."""
    path = cut(tmp_path / "a.hdf5", tag="libero-v1", image_timing=None)
    convert("libero", path, tmp_path / "out", size=128, val_fraction=0, quiet=True)
    samples = [s for s in shards(tmp_path / "out", "train", "agentview")[0] if s["episode"].endswith("demo_1")]
    with h5py.File(path) as file:
        demo = file["data/demo_1"]
        assert len(samples) == len(demo["actions"]) - 1
        np.testing.assert_array_equal([s["original_action"] for s in samples], np.float32(demo["actions"][1:]))
        np.testing.assert_array_equal([s["proprio"][:6] for s in samples], np.float32(demo["obs/ee_states"][:-1]))
        assert psnr(simplejpeg.decode_jpeg(samples[0]["image"]), demo["obs/agentview_rgb"][0][::-1]) > 34


def test_upright_files_stay_upright(tmp_path: Path, cut: Callable[..., Path]) -> None:
    path = cut(tmp_path / "a.hdf5", macros_image_convention="opencv")
    convert("libero", path, tmp_path / "out", size=128, val_fraction=0, quiet=True)
    image = simplejpeg.decode_jpeg(shards(tmp_path / "out", "train", "agentview")[0][0]["image"])
    with h5py.File(path) as file:
        assert psnr(image, file["data/demo_0/obs/agentview_rgb"][0]) > 34


def test_a_damaged_source_is_converted_anew(tmp_path: Path, sample_data: Callable[[str], Path]) -> None:
    """What training refuses for its size is repaired by the same command, what only a checksum shows by --overwrite."""
    out = tmp_path / "out"
    given: dict[str, Any] = {"size": 32, "val_fraction": 0, "max_episodes": 2, "options": BEFORE, "quiet": True}
    convert("libero", sample_data(REAL), out, **given)
    whole = tree(out)
    shard = out / "train" / "agentview" / "shard.00000.mds"

    def again(**more: Any) -> bool:
        outcome = convert("libero", sample_data(REAL), out, **given, **more)
        assert not outcome[1] or tree(out) == whole
        return bool(outcome[1])

    assert not again()
    shard.write_bytes(shard.read_bytes()[:100])
    assert again()
    (out / "train" / "episodes.jsonl").unlink()
    assert again()
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert not again()
    assert again(overwrite=True)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has shards but no manifest.json; .* replace it with --overwrite"):
        again()
    assert again(overwrite=True)


def test_a_killed_conversion_continues_to_the_same_bytes(tmp_path: Path, sample_data: Callable[[str], Path]) -> None:
    arguments = ("libero", sample_data(REAL))
    options = {"size": 128, "val_fraction": 0.3, "slice_frames": 1, "options": BEFORE, "quiet": True}
    convert(*arguments, tmp_path / "whole" / "libero", processes=1, **options)  # type: ignore[arg-type]

    out = tmp_path / "killed" / "libero"
    code = (
        "import sys; from pathlib import Path; from data_tools.convert.driver import convert; "
        f"convert('libero', Path(sys.argv[1]), Path(sys.argv[2]), processes=1, **{options!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(arguments[1]), str(out)])
    first = out.parent / ".libero.partial" / "train-00000"
    while not first.exists() and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    written = first.stat().st_mtime_ns
    with pytest.raises(DataError, match="no such folder"):
        read_manifest(out)

    _, done = convert(*arguments, out, processes=2, **options)  # type: ignore[arg-type]
    assert done
    assert written < (out / "manifest.json").stat().st_mtime_ns
    assert tree(out) == tree(tmp_path / "whole" / "libero")
    assert os.listdir(out.parent) == ["libero"]


def test_finished_output_is_left_alone_and_replaced_only_when_asked(tmp_path: Path, cut: Callable[..., Path]) -> None:
    src, out = cut(tmp_path / "raw" / "a.hdf5"), tmp_path / "out"
    convert("libero", src, out, size=64, quiet=True)
    before = tree(out)
    assert convert("libero", src, out, size=64, quiet=True) == (read_manifest(out), False)
    with pytest.raises(DataError, match=r"image_size: 64 \(asked: 32\)[\s\S]*quality: 95 \(asked: 80\)"):
        convert("libero", src, out, size=32, quality=80, quiet=True)
    assert tree(out) == before
    manifest, done = convert("libero", src, out, size=32, overwrite=True, quiet=True)
    assert (manifest.image_size, done) == (32, True)
    cut(tmp_path / "raw" / "b.hdf5")
    manifest, done = convert("libero", tmp_path / "raw", out, size=32, quiet=True)
    assert (manifest.as_of(0).episodes, manifest.episodes, done) == (3, 6, True), "what is new was added"


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, cut: Callable[..., Path]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="was not written by"):
        convert("libero", cut(tmp_path / "a.hdf5"), tmp_path / "out", overwrite=True, quiet=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_held_out_episodes_do_not_depend_on_order_or_number_of_files(tmp_path: Path, cut: Callable[..., Path]) -> None:
    for name in ("a", "b", "c"):
        cut(tmp_path / "raw" / f"{name}.hdf5")
    convert("libero", tmp_path / "raw", tmp_path / "x", size=32, val_fraction=0.34, slice_frames=20, quiet=True)
    convert("libero", tmp_path / "raw", tmp_path / "y", size=32, val_fraction=0.34, seed=3, quiet=True)
    x, y = ({s: {e.id for e in read_episodes(tmp_path / o, s)} for s in ("train", "val")} for o in "xy")
    assert (len(x["train"]), len(x["val"])) == (6, 3)
    assert not x["train"] & x["val"]
    assert x["train"] | x["val"] == y["train"] | y["val"]
    assert x["val"] != y["val"]


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
        return
    if how == "not HDF5":
        path.write_text("hello")
        return
    with h5py.File(path, "a") as file:
        if how == "no data":
            del file["data"]
        for demo in file.get("data", {}).values():
            if how == "no proprio":
                del demo["obs/ee_states"]
            if how == "grey":
                grey = demo["obs/agentview_rgb"][..., :1]
                del demo["obs/agentview_rgb"]
                demo["obs/agentview_rgb"] = grey
            if how == "small":
                small = demo["obs/agentview_rgb"][:, ::2, ::2]
                del demo["obs/agentview_rgb"]
                demo["obs/agentview_rgb"] = small


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "not a whole HDF5 file"),
        ("not HDF5", "not a whole HDF5 file"),
        ("no data", "no group data/demo_0"),
        ("no proprio", "no obs/ee_states"),
        ("grey", r"uint8 \(12, 128, 128, 1\), not uint8 RGB"),
        ("small", "image sizes differ between episodes: .*128×128 px in a/demo_0; .*64×64 px in b/demo_0"),
    ],
)
def test_unusable_files_are_refused_before_anything_is_written(
    tmp_path: Path, cut: Callable[..., Path], how: str, message: str
) -> None:
    cut(tmp_path / "raw" / "a.hdf5")
    damage(cut(tmp_path / "raw" / "b.hdf5"), how)
    with pytest.raises(DataError, match=message):
        convert("libero", tmp_path / "raw", tmp_path / "out", quiet=True)
    assert sorted(os.listdir(tmp_path)) == ["raw"]


def test_all_problems_of_a_folder_are_named_at_once(tmp_path: Path, cut: Callable[..., Path]) -> None:
    for name, how in (("a", "truncated"), ("b", "no proprio"), ("c", "no data")):
        damage(cut(tmp_path / "raw" / f"{name}.hdf5"), how)
    cut(tmp_path / "raw" / "d.hdf5", image_timing=None, macros_image_convention=None)
    with pytest.raises(DataError) as caught:
        convert("libero", tmp_path / "raw", tmp_path / "out", quiet=True)
    text = str(caught.value)
    for part in ("a.hdf5", "b.hdf5", "c.hdf5", "d.hdf5", "--set image_timing=before", "--set image_orientation"):
        assert part in text


def test_nothing_to_convert(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match=r"no \.hdf5 or \.h5 file"):
        convert("libero", tmp_path / "raw", tmp_path / "out", quiet=True)
    with pytest.raises(DataError, match="no such file or folder"):
        convert("libero", tmp_path / "nowhere", tmp_path / "out", quiet=True)
    with pytest.raises(DataError, match="unknown format 'lerobt'"):
        convert("lerobt", tmp_path / "raw", tmp_path / "out", quiet=True)


def test_bad_options_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"size: 2 [\s\S]*val_fraction: 1\.5 [\s\S]*quality: 0 "):
        convert("libero", tmp_path, tmp_path / "out", size=2, val_fraction=1.5, quality=0, quiet=True)


def test_unwritable_output(tmp_path: Path, cut: Callable[..., Path]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written: .*; name another OUT"):
        convert("libero", cut(tmp_path / "a.hdf5"), tmp_path / "file" / "out", quiet=True)


def test_out_and_raw_data_lie_apart(tmp_path: Path, cut: Callable[..., Path]) -> None:
    """Shards among the raw files would be scanned next time, and OUT is replaced as a whole."""
    raw = cut(tmp_path / "data" / "raw" / "a.hdf5").parent
    for out, where in ((raw / "out", "lies in SRC"), (raw, "is SRC"), (raw.parent, "holds SRC")):
        with pytest.raises(DataError, match=rf"out: .* {where} .*give a folder beside it"):
            convert("libero", raw, out, quiet=True, overwrite=True)
    assert (raw / "a.hdf5").is_file()


def test_a_missing_table_of_instructions_is_named(tmp_path: Path, cut: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"--instructions .*none.csv: no such file; give a CSV with the columns"):
        convert("libero", cut(tmp_path / "a.hdf5"), tmp_path / "out", instructions=tmp_path / "none.csv", quiet=True)


def test_bad_episodes_are_skipped_and_listed_up_to_a_limit(tmp_path: Path, cut: Callable[..., Path]) -> None:
    """Found in the shapes (short actions) or only when read (NaN)."""
    path = cut(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        actions = file["data/demo_0/actions"][:-1]
        del file["data/demo_0/actions"]
        file["data/demo_0/actions"] = actions
        file["data/demo_2/actions"][4, 2] = np.nan
    with pytest.raises(DataError, match=r"2 episodes cannot be used \(max_bad is 1[\s\S]*demo_2: .*not finite"):
        convert("libero", path, tmp_path / "out", max_bad=1, size=32, quiet=True)
    assert not (tmp_path / "out").exists()
    manifest, _ = convert("libero", path, tmp_path / "out", max_bad=2, size=32, val_fraction=0, quiet=True)
    assert [e.id for e in read_episodes(tmp_path / "out", "train")] == ["a/demo_1"]
    assert manifest.splits["train"].frames == 15
    assert manifest.skipped == [
        "a/demo_0: lengths differ: actions 11, obs/ee_states 12, obs/gripper_states 12, obs/agentview_rgb 12",
        "a/demo_2: actions are not finite",
    ]


def test_command_prints_what_it_did_and_errors_without_a_traceback(
    tmp_path: Path, cut: Callable[..., Path], stamo: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    cut(tmp_path / "raw" / "a.hdf5")
    done = stamo("data", "convert", "libero", tmp_path / "raw", tmp_path / "out", "--size", 32)
    assert "train 2 episodes" in done.stdout
    assert "val 1 episode," in done.stdout
    failed = stamo("data", "convert", "libero", tmp_path / "no", tmp_path / "out", check=False)
    assert failed.returncode == 2
    assert "no such file or folder" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_table_gives_instructions(tmp_path: Path, cut: Callable[..., Path]) -> None:
    path, table = cut(tmp_path / "a.hdf5"), tmp_path / "table.csv"

    def run(text: str, out: str = "out") -> list[str]:
        table.write_text(text)
        settings = {"size": 32, "val_fraction": 0, "quiet": True, "instructions": table}
        return convert("libero", path, tmp_path / out, **settings)[0].notes

    notes = run('episode,instruction\na/demo_1,"wave, then bow"\nb/demo_9,bow\n')
    own, told, _ = read_episodes(tmp_path / "out", "train")
    assert (told.instruction, told.task) == ("wave, then bow", "wave, then bow")
    assert own.instruction not in ("", told.instruction)
    texts = {
        row["episode"]: row["instruction"] for rows in shards(tmp_path / "out", "train", "agentview") for row in rows
    }
    assert texts["a/demo_1"] == "wave, then bow"
    assert texts["a/demo_0"] == own.instruction
    assert notes == [
        "instructions: table.csv has those of 1 episode",
        "instructions: 1 of these had another one in the dataset",
        "instructions: table.csv has 1 episode that the dataset has not (b/demo_9)",
    ]
    for text, problem in (
        ("episode,text\na/demo_1,wave\n", "its first line lacks instruction; it has episode, text"),
        ("episode,instruction\na/demo_1,\n", "line 2: needs an episode and an instruction"),
        ("episode,instruction\na/demo_1,x\na/demo_1,y\n", "line 3: a/demo_1 is there twice"),
        ("episode,instruction\nz,x\n", "none of its 1 episodes is in the dataset, whose first are a/demo_0"),
        (
            "episode,instruction\na/demo_1,bow\n",
            "instructions: table.csv, sha256 ",
        ),  # another table, another conversion
    ):
        with pytest.raises(DataError, match=problem):
            run(text)
