"""`stamo sync`: checkpoints into a real S3 server and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import xxhash
from s3 import relay

pytest.importorskip("moto.server", reason="needs the [dev] extra: pip install -e '.[dev]'")

from data_tools.stores import multipart
from data_tools.stores.checkpoints import copy_checkpoint
from stamo_dist.checkpoint.manifest import MANIFEST, CheckpointManifest, Stored
from stamo_dist.checkpoint.select import select_checkpoint
from stamo_dist.errors import CheckpointError, DataError, RunError, StamoError
from stamo_dist.run.state import RunState

LARGE = 23 << 20


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 MB, the least S3 takes."""
    monkeypatch.setattr(multipart, "PART", 5 << 20)


def checkpoint(run: Path, step: int = 7) -> Path:
    """Of a large and a small file."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    contents = {"dcp/__0_0.distcp": bytes(range(251)) * (LARGE // 251), "ema/.metadata": b"small"}
    files = {}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        files[name] = Stored(len(content), f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}")
    state = RunState(step, cursor={"samples": 8}, samples=[8])
    (folder / MANIFEST).write_text(CheckpointManifest(state, "ddp", 1, "fp32", "f", files).text())
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_there_and_back_and_nothing_twice(tmp_path: Path, bucket: Any) -> None:
    folder = checkpoint(tmp_path / "run")
    there = f"s3://{bucket.name}/kept"
    assert copy_checkpoint(str(tmp_path / "run"), there, quiet=True).files == 3
    again = copy_checkpoint(str(folder), there, quiet=True)
    assert (again.files, again.skipped) == (0, 3)
    back = copy_checkpoint(f"{there}/{folder.name}", str(tmp_path / "back"), quiet=True)
    assert (back.files, tree(tmp_path / "back" / folder.name)) == (3, tree(folder))
    with pytest.raises(RunError, match=rf"--resume {there}: copy it here first \(stamo sync"):
        select_checkpoint(tmp_path / "none", there)
    (folder / "dcp/__0_0.distcp").write_bytes(b"1" * (LARGE // 251 * 251))
    with pytest.raises(DataError, match=r"__0_0\.distcp: changed since it was written"):
        copy_checkpoint(str(folder), f"s3://{bucket.name}/damaged", quiet=True)
    assert [o.key for o in bucket.objects.filter(Prefix="damaged") if "__0_0" in o.key or MANIFEST in o.key] == []
    bad = checkpoint(tmp_path / "bad")
    state = RunState(7, cursor={}, samples=[])
    outside = CheckpointManifest(state, "ddp", 1, "fp32", "f", {"../../evil": Stored(1, "xxh3_128:0")})
    bucket.put_object(Key=f"evil/{bad.name}/{MANIFEST}", Body=outside.text().encode())
    with pytest.raises(CheckpointError, match=r"names \.\./\.\./evil, which is not within it"):
        copy_checkpoint(f"s3://{bucket.name}/evil/{bad.name}", str(tmp_path / "deep/er"), quiet=True)
    assert not (tmp_path / "evil").exists()


def test_a_cut_copy_goes_on_within_its_files_and_counts_only_when_whole(
    tmp_path: Path, bucket: Any, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "run")
    there, port = f"s3://{bucket.name}/kept", int(s3.rpartition(":")[2])
    with relay(port, lambda passed, left=[2.6 * (5 << 20)]: _spend(left, passed)) as line:
        monkeypatch.setenv("S3_ENDPOINT_URL", line)
        with pytest.raises(StamoError, match="cannot be reached"):
            copy_checkpoint(str(folder), there, parallel=1, quiet=True, pause=0.01)
    monkeypatch.setenv("S3_ENDPOINT_URL", s3)
    with pytest.raises(CheckpointError, match=f"no {MANIFEST}, so it is no checkpoint"):
        copy_checkpoint(f"{there}/{folder.name}", str(tmp_path / "back"), quiet=True)
    sent: list[int] = []
    with relay(port, lambda passed: sent.append(passed) or True) as line:
        monkeypatch.setenv("S3_ENDPOINT_URL", line)
        copy_checkpoint(str(folder), there, parallel=1, quiet=True)
    assert LARGE - 3.5 * (5 << 20) < sum(sent) < LARGE - 1.5 * (5 << 20), "two parts were there"
    monkeypatch.setenv("S3_ENDPOINT_URL", s3)
    copy_checkpoint(f"{there}/{folder.name}", str(tmp_path / "back"), quiet=True)
    assert tree(tmp_path / "back" / folder.name) == tree(folder)


def _spend(left: list[float], passed: int) -> bool:
    left[0] -= passed
    return left[0] > 0
