"""Data sets that lie elsewhere: a real S3 server, and a server that answers as the Hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import Repository, serving
from raw import write_raw
from s3 import free_port

pytest.importorskip("moto.server", reason="needs the [dev] extra: pip install -e '.[dev]'")

from data_tools.convert.driver import convert
from data_tools.stores.sources import bring, is_remote
from stamo_dist.errors import DataError


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_bucket_is_copied_once_and_followed(tmp_path: Path, bucket: Any) -> None:
    files = {"a.zarr/.zgroup": b"{}", "a.zarr/img/0.0": b"x" * 5000, "notes.txt": b""}
    for name, content in files.items():
        bucket.put_object(Key=f"raw/set/{name}", Body=content)
    for key in ("raw/set/", "raw/set/../evil", "raw/setting/other"):
        bucket.put_object(Key=key, Body=b"")
    url = f"s3://{bucket.name}/raw/set/"
    first = bring(url, tmp_path / "work", quiet=True)
    assert (first.path.name, first.files, first.bytes, first.there) == ("set", 3, 5002, 0)
    assert tree(first.path) == files
    assert f"in {first.path}, which is kept" in str(first)
    assert (bring(url, tmp_path / "work", quiet=True).files, first.path.exists()) == (0, True)
    (first.path / "a.zarr" / "img" / "0.0").unlink()  # as after a kill
    (first.path / "a.zarr" / "img" / ".0.0.part").write_bytes(b"half")
    bucket.Object("raw/set/notes.txt").put(Body=b"new")
    bucket.Object("raw/set/a.zarr/.zgroup").delete()
    again = bring(url, tmp_path / "work", quiet=True)
    assert (again.files, again.there) == (2, 0)
    assert tree(first.path) == {"a.zarr/img/0.0": b"x" * 5000, "notes.txt": b"new"}
    one = bring(f"s3://{bucket.name}/raw/set/notes.txt", tmp_path / "work", quiet=True)
    assert one.path.read_bytes() == b"new"
    assert one.path.name == "notes.txt"
    assert not list(tmp_path.rglob("evil"))


def test_a_bucket_is_converted(tmp_path: Path, bucket: Any, capfd: pytest.CaptureFixture[str]) -> None:
    raw = write_raw(tmp_path / "raw" / "can.hdf5")
    bucket.upload_file(str(raw), "sets/can.hdf5")
    here, _ = convert("robomimic", raw.parent, tmp_path / "here", size=32, name="can", quiet=True)
    there, _ = convert(
        "robomimic", f"s3://{bucket.name}/sets", tmp_path / "there", size=32, name="can", work=tmp_path / "work"
    )
    assert (there.checksums, there.source_fingerprint) == (here.checksums, here.source_fingerprint)
    said = " ".join(capfd.readouterr().err.split())
    assert f"s3://{bucket.name}/sets: in {tmp_path}/work/sources/" in said
    assert f"(1 files, {raw.stat().st_size / 1e6:.1f} MB fetched; 0 files were there already)" in said


def test_what_cannot_be_fetched_is_said(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        f"s3://{bucket.name}/nothing": "nothing is there; check the URL",
        f"s3://{bucket.name}": "nothing is there",
        "s3://nowhere/x": r"there is no bucket 'nowhere' at http.*create it, or check its name",
        "gs://b/raw": r"gs:// is not fetched from here.*`gsutil -m cp -r gs://b/raw DIR`.* and convert that",
        "sftp://b/raw": r"copy it to a folder and convert that",
        "hf://models/a/b": r"write hf://datasets/OWNER/NAME",
    }
    for url, text in cases.items():
        with pytest.raises(DataError, match=text) as caught:
            bring(url, tmp_path / "work", quiet=True)
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    bucket.put_object(Key="x/a", Body=b"a")
    with pytest.raises(DataError, match=r"file/\w+: cannot be written: .*--work DIR"):
        bring(f"s3://{bucket.name}/x", tmp_path / "file", quiet=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    found = {src: is_remote(src) for src in ("raw/libreo", "lerobot/pusht", "lerobot/pusht@v2.0", "a", "/a/b", "a/b/c")}
    assert [src for src, remote in found.items() if remote] == ["lerobot/pusht", "lerobot/pusht@v2.0"]


HELD = {"README.md": b"# a set", "data/a.hdf5": b"a" * 3000, "data/deep/b.hdf5": b"b" * 10}


def fetched(home: Path, endpoint: str, *sources: str, offline: bool = False) -> list[Any]:
    """What `bring` says of these in a process of its own, as the Hub's settings are read at its start."""
    code = (
        "import json, sys\nfrom data_tools.stores.sources import bring\nfrom stamo_dist.errors import DataError\n"
        "for src in sys.argv[1:]:\n"
        "    try:\n        b = bring(src, quiet=True)\n"
        "        print(json.dumps([str(b.path), b.files, b.bytes, b.there]))\n"
        "    except DataError as e:\n        print(json.dumps(str(e)))\n"
    )
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    for name in ("HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(name, None)
    command = [sys.executable, "-c", code, *sources]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=120)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_hub(tmp_path: Path) -> None:
    with serving() as hub:
        hub.datasets["lab/arm"] = Repository(dict(HELD))
        url = hub.url
        sources = ("hf://datasets/lab/arm/data", "lab/arm", "lab/arm", "lab/leg", "hf://datasets/lab/arm/date")
        some, whole, again, lost, misspelt = fetched(tmp_path, url, *sources)
        assert some[1:] == [2, 3010, 0]
        assert tree(Path(some[0])) == {"a.hdf5": HELD["data/a.hdf5"], "deep/b.hdf5": HELD["data/deep/b.hdf5"]}
        assert whole[1:] == [1, len(HELD["README.md"]), 2]
        assert again == [whole[0], 0, 0, 3]
        assert "lab/leg: there is no file or folder lab/leg, and the Hub did not supply the data set lab/leg" in lost
        assert "`hf download lab/leg --repo-type dataset --local-dir DIR`" in lost
        assert "lab/arm has no date" in misspelt
    (known, unknown) = fetched(tmp_path, url, "lab/arm", "lab/foot", offline=True)
    assert known[1:] == [0, 0, 3]
    assert "without network run" in unknown
    (dead,) = fetched(tmp_path / "other", f"http://127.0.0.1:{free_port()}", "hf://datasets/lab/arm")
    assert "the Hub did not supply the data set lab/arm" in dead
    assert all("\n" not in line for line in (lost, misspelt, unknown, dead))
