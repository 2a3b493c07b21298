"""Conversions that are shared, killed, starved of disk space, or sent to a bucket: always the same bytes, or none."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import h5py
import pytest
from s3 import dead_line

from data_tools.convert.driver import Settings, convert, run
from data_tools.convert.publish import upload
from stamo_dist.data.schema import MANIFEST, read_episodes, read_manifest
from stamo_dist.errors import DataError

OPTIONS = {"size": 48, "val_fraction": 0.25, "slice_frames": 1, "quiet": True}
CODE = """
import json, sys
from pathlib import Path
from data_tools.convert.driver import Settings, run
out, settings = sys.argv[2], json.loads(sys.argv[3])
if "work" in settings:
    settings["work"] = Path(settings["work"])
outcome = run("libero", Path(sys.argv[1]), out, Settings(**settings))
print("whole" if outcome.manifest else " ".join(outcome.missing))
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, cut: Callable[..., Path]) -> Path:
    """Nine episodes in three files."""
    folder = tmp_path_factory.mktemp("raw")
    for name in ("a", "b", "c"):
        cut(folder / f"{name}.hdf5")
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, raw: Path) -> dict[str, bytes]:
    """What one undisturbed run in one process writes."""
    out = tmp_path_factory.mktemp("expected") / "libero"
    convert("libero", raw, out, processes=1, **OPTIONS)
    return tree(out)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, bytes]]]:
    """A real S3 server with the empty bucket "shards"; a function that reads all its objects."""
    server = pytest.importorskip(
        "moto.server", reason="needs the [dev] extra: pip install -e '.[dev]'"
    ).ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "S3_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    s3 = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    s3.create_bucket(Bucket="shards")

    def objects() -> dict[str, bytes]:
        found = s3.list_objects_v2(Bucket="shards").get("Contents", [])
        return {item["Key"]: s3.get_object(Bucket="shards", Key=item["Key"])["Body"].read() for item in found}

    yield objects
    server.stop()


def start(raw: Path, out: Path | str, **settings: object) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CODE, str(raw), str(out), json.dumps({**OPTIONS, **settings})]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.002)


def test_an_array_shares_the_work_and_the_last_one_puts_it_together(
    tmp_path: Path, raw: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "libero"
    settings = [Settings(**OPTIONS, processes=1, num_slices=3, slice=i) for i in range(3)]
    first = run("libero", raw, out, settings[2])
    assert first.manifest is None
    assert len(first.missing) == 6
    assert not out.exists()
    assert len(run("libero", raw, out, settings[0]).missing) == 3
    assert run("libero", raw, out, settings[1]).manifest == read_manifest(out)
    assert tree(out) == expected
    assert os.listdir(tmp_path) == ["libero"]
    assert not run("libero", raw, out, settings[2]).done


def test_killed_in_two_processes_and_run_again(tmp_path: Path, raw: Path, expected: dict[str, bytes]) -> None:
    out = tmp_path / "libero"
    partial = tmp_path / ".libero.partial"
    process = start(raw, out, processes=2)
    wait_for(lambda: len(list(partial.glob("*/slice.json"))) > 1, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = {shard.stat().st_ino for report in partial.glob("*/slice.json") for shard in report.parent.rglob("*.mds")}
    assert done
    assert convert("libero", raw, out, processes=2, **OPTIONS)[1]
    assert done < {shard.stat().st_ino for shard in out.rglob("*.mds")}, "finished slices were converted again"
    assert tree(out) == expected
    assert os.listdir(tmp_path) == ["libero"]


def test_two_runs_of_the_same_conversion_at_a_time(tmp_path: Path, raw: Path, expected: dict[str, bytes]) -> None:
    """They share the slices; killing one in the middle of its slice leaves it to the other."""
    out = tmp_path / "libero"
    runs = [start(raw, out, processes=1) for _ in range(3)]
    wait_for(lambda: list((tmp_path / ".libero.partial").glob(".*.tmp")), runs[0])
    os.kill(runs[0].pid, signal.SIGKILL)
    said = [process.communicate(timeout=120) for process in runs]
    assert [process.returncode for process in runs[1:]] == [0, 0], said
    assert [out.strip() for out, _ in said[1:]] == ["whole", "whole"]
    assert tree(out) == expected
    assert os.listdir(tmp_path) == ["libero"]


def test_another_conversion_into_the_same_folder_waits_its_turn(tmp_path: Path, raw: Path) -> None:
    """A live one is not disturbed; what a dead one left is dropped."""
    out = tmp_path / "libero"
    process = start(raw, out, processes=1)
    wait_for(lambda: list((tmp_path / ".libero.partial").glob(".*.tmp")), process)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="another conversion, with other options"):
        convert("libero", raw, out, **{**OPTIONS, "size": 32})
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert convert("libero", raw, out, **{**OPTIONS, "size": 32})[0].image_size == 32


def test_a_full_disk_is_named_and_what_is_finished_counts(
    tmp_path: Path, raw: Path, expected: dict[str, bytes]
) -> None:
    """A limit on the size of files stops the writing of the longer episodes, as a full disk would."""
    out = tmp_path / "libero"
    sizes = sorted(len(content) for name, content in expected.items() if name.endswith(".mds"))
    limit = sizes[len(sizes) // 2]
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))\n{CODE}"
    arguments = [sys.executable, "-c", code, str(raw), str(out), json.dumps({**OPTIONS, "processes": 1})]
    failed = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert "cannot be written: File too large; what is finished stays, run again to continue" in failed.stderr
    assert not out.exists()
    kept = list((tmp_path / ".libero.partial").glob("*/slice.json"))
    assert kept
    assert convert("libero", raw, out, processes=1, **OPTIONS)[1]
    assert tree(out) == expected


def test_an_episode_that_breaks_while_its_frames_are_read_is_skipped(tmp_path: Path, cut: Callable[..., Path]) -> None:
    """Damage in the middle of a compressed image is seen only when it is unpacked."""
    path = cut(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        frames = file["data/demo_1/obs/agentview_rgb"][:]
        del file["data/demo_1/obs/agentview_rgb"]
        name = "data/demo_1/obs/agentview_rgb"
        images = file.create_dataset(name, data=frames, chunks=(1, *frames.shape[1:]), compression="gzip")
        chunk = images.id.get_chunk_info(9)
    with path.open("r+b") as raw_file:
        raw_file.seek(chunk.byte_offset + chunk.size // 2)
        raw_file.write(b"\0" * 64)
    manifest, _ = convert("libero", path, tmp_path / "out", **OPTIONS)
    assert len(manifest.skipped) == 1
    assert manifest.skipped[0].startswith(f"a/demo_1: agentview: {path}: not a whole HDF5 file (")
    assert sum(split.episodes for split in manifest.splits.values()) == 2


def test_first_episodes_and_the_datasets_own_split(
    tmp_path: Path, raw: Path, sample_data: Callable[[str], Path]
) -> None:
    manifest, _ = convert("libero", raw, tmp_path / "few", max_episodes=4, **OPTIONS)
    assert sum(split.episodes for split in manifest.splits.values()) == 4
    ids = {e.id.split("/")[0] for split in manifest.splits for e in read_episodes(tmp_path / "few", split)}
    assert ids == {"a", "b"}
    with pytest.raises(DataError, match="no split of its own; give --split-by hash"):
        convert("libero", raw, tmp_path / "own", split_by="source", **OPTIONS)
    bridge = sample_data("bridge_rlds")
    manifest, _ = convert("rlds", bridge, tmp_path / "bridge", split_by="source", **OPTIONS)
    assert {name: split.episodes for name, split in manifest.splits.items()} == {"train": 7, "val": 7}


@pytest.mark.parametrize("rate_hz", [10, 2.5])
def test_another_rate_keeps_images_actions_and_times_in_step(
    tmp_path: Path, cut: Callable[..., Path], rate_hz: float
) -> None:
    from test_convert import shards

    path, options = cut(tmp_path / "a.hdf5"), {**OPTIONS, "val_fraction": 0}
    convert("libero", path, tmp_path / "all", **options)
    convert("libero", path, tmp_path / "some", **options, rate_hz=rate_hz)
    assert read_manifest(tmp_path / "some").rate_hz == rate_hz
    step = int(20 / rate_hz)
    every, kept = (
        [s for shard in shards(tmp_path / out, "train", "agentview") for s in shard if s["episode"] == "a/demo_2"]
        for out in ("all", "some")
    )
    assert len(every) == 18
    assert len(kept) == -(-18 // step)
    for i, sample in enumerate(kept):
        same, until = every[i * step], every[i * step : (i + 1) * step]
        assert (sample["t"], sample["length"]) == (i, len(kept))
        assert sample["image"] == same["image"]
        assert sample["time"] == pytest.approx(i / rate_hz)
        assert sample["original_action"] == pytest.approx(same["original_action"])
        assert sample["action"][:3] == pytest.approx(sum(s["action"][:3] for s in until), abs=1e-6)
        assert sample["action"][6] == until[-1]["action"][6]
    with pytest.raises(DataError, match="40 Hz is above the 20 Hz"):
        convert("libero", path, tmp_path / "fast", **options, rate_hz=40)


def test_no_ops_and_their_time_are_left_out(tmp_path: Path, cut: Callable[..., Path]) -> None:
    from test_convert import shards

    path = cut(tmp_path / "a.hdf5")
    with h5py.File(path, "a") as file:
        actions = file["data/demo_0/actions"]
        still = actions[3]
        still[:6] = 0
        for t in (4, 5, 9):
            actions[t] = still
    convert("libero", path, tmp_path / "out", **{**OPTIONS, "val_fraction": 0}, drop_noops=True)
    samples = [s for shard in shards(tmp_path / "out", "train", "agentview") for s in shard]
    samples = [s for s in samples if s["episode"] == "a/demo_0"]
    assert [s["time"] for s in samples] == [pytest.approx(i / 20) for i in range(9)]
    with h5py.File(path) as file:
        kept = file["data/demo_0/actions"][[0, 1, 2, 3, 6, 7, 8, 10, 11]]
    assert [s["original_action"].tolist() for s in samples] == kept.astype("float32").tolist()


def test_into_a_bucket(
    tmp_path: Path, raw: Path, expected: dict[str, bytes], bucket: Callable[[], dict[str, bytes]]
) -> None:
    """Killed while uploading there is no manifest yet; run again it uploads the rest; and then it leaves it alone."""
    url, settings = "s3://shards/made/libero", {"processes": 1, "work": str(tmp_path / "work")}
    server = os.environ["S3_ENDPOINT_URL"]
    half = sum(map(len, expected.values())) // 2
    with dead_line(int(server.rsplit(":", 1)[1]), half) as (line, dead), pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_ENDPOINT_URL", line)
        process = start(raw, url, **settings)
        wait_for(dead.is_set, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert bucket(), "some of it has arrived"
    assert f"made/libero/{MANIFEST}" not in bucket()
    work = {**settings, "work": tmp_path / "work"}
    manifest, done = convert("libero", raw, url, **OPTIONS, **work)
    assert done
    assert {key.removeprefix("made/libero/"): value for key, value in bucket().items()} == expected
    assert os.listdir(tmp_path / "work") == []
    assert convert("libero", raw, url, **OPTIONS, **work) == (manifest, False)
    with pytest.raises(DataError, match=r"s3://shards/made/libero: already [\s\S]*image_size: 48 \(asked: 32\)"):
        convert("libero", raw, url, **{**OPTIONS, "size": 32}, **work)
    replaced, _ = convert("libero", raw, url, **{**OPTIONS, "size": 32}, **work, overwrite=True)
    assert replaced.image_size == 32
    assert json.loads(bucket()[f"made/libero/{MANIFEST}"])["image_size"] == 32


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_named_before_anything_is_converted(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(DataError, match="no bucket 'elsewhere'"):
        convert("libero", raw, "s3://elsewhere/libero", work=tmp_path / "work", **OPTIONS)
    assert not (tmp_path / "work").exists()


def test_other_stores_get_each_file_once_and_the_manifest_last(tmp_path: Path, raw: Path) -> None:
    """By mosaicml-streaming's uploader, here its local one."""
    source, target = tmp_path / "libero", tmp_path / "store"
    convert("libero", raw, source, **OPTIONS)
    (target / "train" / "agentview").mkdir(parents=True)
    with pytest.raises(DataError, match=r"val/agentview/index\.json: cannot be written"):
        upload(source, str(target))
    assert len(tree(target)) > 1
    assert not (target / MANIFEST).exists()
    (target / "val" / "agentview").mkdir(parents=True)
    upload(source, str(target))
    uploaded = tree(target)
    assert {name: value for name, value in tree(source).items() if name != ".uploaded.json"} == uploaded
    stamps = {p: p.stat().st_mtime_ns for p in target.rglob("*")}
    upload(source, str(target))
    assert {p: p.stat().st_mtime_ns for p in target.rglob("*")} == stamps
