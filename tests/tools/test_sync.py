"""Copies of real sources between folders and a real S3 server, whole or not at all."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3 import bad_line, free_port, server, use

pytest.importorskip("moto.server", reason="needs the [dev] extra: pip install -e '.[dev]'")

from data_tools.convert.driver import convert
from data_tools.look.check import check
from data_tools.look.stats import source_stats
from data_tools.stores.open import open_store
from data_tools.stores.sync import sync
from stamo_dist.data.schema import MANIFEST, read_manifest
from stamo_dist.errors import DataError

REAL = "libero_spatial_task2_128.hdf5"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, sample_data: Callable[[str], Path]) -> Path:
    """Three real episodes, two cameras, six shards."""
    out = tmp_path_factory.mktemp("sync") / "libero"
    options = {"image_timing": "before"}
    convert("libero", sample_data(REAL), out, size=64, val_fraction=0.3, shard_bytes=1, options=options, quiet=True)
    latents = out / "train" / "agentview" / "latents-1"
    latents.mkdir()
    (latents / "shard.00000.npy").write_bytes(b"latents")
    (latents / "shard.00000.json").write_text("{}")
    return out


def tree(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if not p.name.startswith(".")}


def test_there_and_back_is_the_same(source: Path, tmp_path: Path, bucket: Any) -> None:
    url = f"s3://{bucket.name}/shards/libero"
    there = sync(str(source), url, quiet=True)
    assert (there.files, there.skipped) == (len(tree(source)), 0)
    back = sync(url, str(tmp_path / "back"), quiet=True)
    assert tree(tmp_path / "back") == tree(source)
    assert back.bytes == sum(map(len, tree(source).values()))
    assert check(str(tmp_path / "back"), quiet=True, processes=1).unchanged == 0
    for again in (sync(str(source), url, quiet=True), sync(url, str(tmp_path / "back"), quiet=True)):
        assert (again.files, again.skipped) == (0, len(tree(source)))
    beyond = f"s3://{bucket.name}/elsewhere"
    sync(url, beyond, quiet=True)
    sync(str(tmp_path / "back"), str(tmp_path / "local"), quiet=True)
    assert tree(tmp_path / "local") == tree(source)
    assert [o.key.split("/", 1)[1] for o in bucket.objects.filter(Prefix="elsewhere/")] == sorted(tree(source))


def test_a_remote_source_is_checked_and_its_statistics_taken(source: Path, tmp_path: Path, bucket: Any) -> None:
    url = f"s3://{bucket.name}/libero"
    sync(str(source), url, quiet=True)
    assert source_stats(url) == source_stats(source)
    first = check(url, quiet=True, processes=1, cache=tmp_path)
    assert (first.findings, first.looked) == ([], first.total)
    assert check(url, quiet=True, processes=1, cache=tmp_path).unchanged == 6
    name = "libero/val/agentview/shard.00000.mds"
    content = bucket.Object(name).get()["Body"].read()
    bucket.Object(name).put(Body=content[:-1] + bytes([content[-1] ^ 1]))
    damaged = check(url, quiet=True, processes=1, cache=tmp_path)
    assert [f.where("S") for f in damaged.findings if f.check == "checksum"] == ["S/val/agentview/shard.00000.mds"]
    assert damaged.unchanged == 5
    with pytest.raises(DataError, match=r"val/agentview/shard.00000.mds: its sha256 .* damaged"):
        sync(url, str(tmp_path / "copy"), quiet=True, pause=0.01)
    assert not (tmp_path / "copy" / MANIFEST).exists()
    bucket.Object(name).delete()
    assert [f.text for f in check(url, quiet=True, processes=1, cache=tmp_path).findings] == ["missing"]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_killed_in_the_middle_it_is_no_source_and_continues(
    source: Path, tmp_path: Path, bucket: Any, direction: str
) -> None:
    many = tmp_path / "many"
    shutil.copytree(source, many)
    extras = many / "train" / "agentview" / "latents-2"
    extras.mkdir()
    for n in range(60):
        (extras / f"shard.{n:05}.npy").write_bytes(os.urandom(20_000))
    url, copy = f"s3://{bucket.name}/libero", tmp_path / "copy"
    if direction == "down":
        sync(str(many), url, quiet=True)
    src, dst = (str(many), url) if direction == "up" else (url, str(copy))
    command = f"from data_tools.stores.sync import sync; sync({src!r}, {dst!r}, quiet=True, parallel=2)"
    process = subprocess.Popen([sys.executable, "-c", command])

    def arrived() -> int:
        return len(list(bucket.objects.all())) if direction == "up" else len(tree(copy))

    while arrived() < 3 and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = arrived()
    assert 0 < there < len(tree(many))
    store = open_store(dst)
    assert store.stat(MANIFEST) is None
    if direction == "down":
        with pytest.raises(DataError, match="never finished"):
            read_manifest(copy)
    again = sync(src, dst, quiet=True)
    assert again.skipped == there
    assert again.files == len(tree(many)) - there
    if direction == "up":
        sync(url, str(copy), quiet=True)
    assert tree(copy) == tree(many)
    assert not list(copy.rglob(".*.part"))


def test_keys_that_point_out_of_the_folder_are_not_copied(source: Path, tmp_path: Path, bucket: Any) -> None:
    url, out = f"s3://{bucket.name}/libero", tmp_path / "a" / "copy"
    sync(str(source), url, quiet=True)
    for key in ("libero/../../evil", f"libero/{tmp_path}/evil", "libero/train/../../../evil"):
        bucket.Object(key).put(Body=b"evil")
    sync(url, str(out), quiet=True)
    assert tree(out) == tree(source)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_the_server_refuses_is_said_with_what_to_do(
    source: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"there is no bucket 'nowhere' at http.*create it"):
        sync(str(source), "s3://nowhere/libero", quiet=True)
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        sync(f"s3://{bucket.name}/nothing", str(source.parent / "x"), quiet=True)
    with pytest.raises(DataError, match="no bucket in it"):
        sync(str(source), "s3:///libero", quiet=True)
    with server(free_port(), INITIAL_NO_AUTH_ACTION_COUNT="0") as strict:
        use(monkeypatch, strict)
        with pytest.raises(DataError, match=r"403.*may not look at it; ask the bucket's owner for s3:ListBucket"):
            sync(str(source), "s3://theirs/libero", quiet=True)
        with pytest.raises(DataError, match="403"):
            check("s3://theirs/other", quiet=True)


def test_without_credentials_it_says_where_they_come_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(403)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Closed) as closed:
        threading.Thread(target=closed.serve_forever, daemon=True).start()
        use(monkeypatch, f"http://127.0.0.1:{closed.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        with pytest.raises(DataError, match="403: may not look at it without credentials; set AWS_PROFILE"):
            sync(str(source), "s3://theirs/libero", quiet=True)
        closed.shutdown()


def test_a_bad_line_is_tried_again_and_a_dead_one_is_named(
    source: Path, tmp_path: Path, s3: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket.name}/libero"
    sync(str(source), url, quiet=True)
    with bad_line(int(s3.rsplit(":", 1)[1]), cuts=14) as line:
        use(monkeypatch, line)
        sync(url, str(tmp_path / "copy"), quiet=True, parallel=2, pause=0.01)
    assert tree(tmp_path / "copy") == tree(source)
    use(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(DataError, match=r"127\.0\.0\.1.* cannot be reached.*S3_ENDPOINT_URL"):
        sync(url, str(tmp_path / "x"), quiet=True, pause=0.01)


def test_nothing_is_copied_that_is_not_whole(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    for name in ("train/agentview/shard.00001.mds", "val/episodes.jsonl"):
        (broken / name).unlink()
    with pytest.raises(DataError, match=r"2 files of the source are missing:\ntrain/agentview/shard.00001.mds\nval/"):
        sync(str(broken), str(tmp_path / "copy"), quiet=True)
    assert not (tmp_path / "copy").exists()
    (broken / MANIFEST).unlink()
    with pytest.raises(DataError, match="never finished"):
        sync(str(broken), str(tmp_path / "copy"), quiet=True)


def test_another_source_is_not_overwritten_unless_asked(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    sync(str(source), str(other), quiet=True)
    manifest = read_manifest(other)
    changed = {"train/agentview/shard.00009.mds": "0" * 64}
    (other / "train/agentview/shard.00009.mds").write_bytes(b"old")
    (other / MANIFEST).write_text(
        manifest.model_copy(update={"name": "old", "checksums": {**manifest.checksums, **changed}}).model_dump_json()
    )
    with pytest.raises(DataError, match=r"holds another source or conversion \(old: libero, 64 px"):
        sync(str(source), str(other), quiet=True)
    sync(str(source), str(other), overwrite=True, quiet=True)
    assert tree(other) == tree(source)
    with pytest.raises(DataError, match="are the same"):
        sync(str(source), f"{source}/", quiet=True)


def test_damage_at_the_destination_is_repaired(source: Path, tmp_path: Path) -> None:
    sync(str(source), str(tmp_path / "copy"), quiet=True)
    shard = tmp_path / "copy" / "train/agentview/shard.00001.mds"
    shard.write_bytes(b"?" + shard.read_bytes()[1:])
    again = sync(str(source), str(tmp_path / "copy"), quiet=True)
    assert again.files == 1
    assert tree(tmp_path / "copy") == tree(source)


def test_a_full_disk_is_named(source: Path, tmp_path: Path) -> None:
    """/dev/full refuses every byte."""
    copy = tmp_path / "copy"
    folder = copy / "train" / "agentview"
    folder.mkdir(parents=True)
    (folder / ".shard.00000.mds.part").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"agentview: cannot be written: No space left on device.*run it again"):
        sync(str(source), str(copy), quiet=True)
    assert not (copy / MANIFEST).exists()
