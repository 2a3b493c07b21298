"""Nothing in a source of shards is run, and nothing outside of its folder is read or written for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from payload import plant_in_shards, works
from toy import make_source, write_recipe

SAID = "has columns of type pkl, which may run code"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Source a with a payload in every sample, and what it would leave."""
    shards = tmp_path_factory.mktemp("planted")
    mark = shards / "mark"
    works(mark)
    for name in "ab":
        make_source(shards, name)
    plant_in_shards(shards / "a", mark)
    return SimpleNamespace(shards=shards, source=shards / "a", mark=mark)


def test_the_payload_runs_where_streaming_reads_it(evil: SimpleNamespace) -> None:
    import stamo_dist._streaming  # noqa: F401  # isort: skip  must precede streaming
    from streaming import LocalDataset

    dataset = LocalDataset(str(evil.source / "train/front"))
    dataset[0]
    assert evil.mark.is_dir()
    evil.mark.rmdir()


@pytest.mark.parametrize("command", ["train", "encode"])
def test_recipes(evil: SimpleNamespace, stamo: Callable[..., Any], toy, tmp_path: Path, command: str) -> None:
    recipe = write_recipe(tmp_path / "toy.yaml", evil.shards, toy.vae)
    done = stamo(command, recipe, check=False)
    assert done.returncode == 2, done.stderr
    assert SAID in done.stdout + done.stderr
    assert not evil.mark.exists()


@pytest.mark.parametrize("command", ["check", "stats", "preview", "sync"])
def test_data_commands(evil: SimpleNamespace, stamo: Callable[..., Any], tmp_path: Path, command: str) -> None:
    more = [str(tmp_path / "copy")] if command == "sync" else []
    done = stamo("data", command, evil.source, *more, check=False)
    assert done.returncode, done.stdout
    assert SAID in " ".join((done.stdout + done.stderr).split())
    assert not evil.mark.exists()
    assert not (tmp_path / "copy/manifest.json").exists()


def test_evaluation(evil: SimpleNamespace) -> None:
    """What every measurement opens held-out frames by; and what decodes a sample, whoever opened its shard."""
    from stamo_dist.data.shards import MappedShard, ShardLayout, ShardSpec
    from stamo_dist.data.sources import open_camera, open_source
    from stamo_dist.errors import DataError

    with pytest.raises(DataError, match=SAID):
        open_camera(open_source(str(evil.source)), "val", "front")
    (entry, *_) = json.loads((evil.source / "val/front/index.json").read_text())["shards"]
    raw = entry["raw_data"]
    for name in ("pkl", "pkl:", "list[pkl]", "PKL"):
        encodings = tuple(name if e == "pkl" else e for e in entry["column_encodings"])
        layout = ShardLayout(tuple(entry["column_names"]), encodings, tuple(s or None for s in entry["column_sizes"]))
        spec = ShardSpec(str(evil.source / "val/front" / raw["basename"]), raw["bytes"], entry["samples"], layout, "")
        with pytest.raises(DataError, match="which may run code"):
            MappedShard(spec).sample(0, ["instruction"])
    assert not evil.mark.exists()


def edited(source: Path, file: str, change: Callable[[Any], Any]) -> Path:
    path = source / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return source


@pytest.mark.parametrize("name", ["../../../elsewhere/x.mds", "/etc/passwd", "..", "", ".hidden"])
def test_shards_elsewhere(tmp_path: Path, stamo: Callable[..., Any], name: str) -> None:
    from stamo_dist.data.sources import open_camera, open_source
    from stamo_dist.errors import DataError

    def rename(index: Any) -> None:
        index["shards"][0]["raw_data"]["basename"] = name

    source = edited(make_source(tmp_path, "a", episodes=1, length=2), "train/front/index.json", rename)
    with pytest.raises(DataError, match="is not a file name"):
        open_camera(open_source(str(source)), "train", "front")
    if name.startswith(".."):
        done = stamo("data", "sync", source, tmp_path / "copy", check=False)
        assert done.returncode == 2
        assert "is not a file name" in done.stderr


@pytest.mark.parametrize("field", ["cameras", "splits"])
@pytest.mark.parametrize("name", ["../../b/train", "/etc", ""])
def test_folders_elsewhere(tmp_path: Path, field: str, name: str) -> None:
    from stamo_dist.data.schema import read_manifest
    from stamo_dist.errors import DataError

    def rename(manifest: Any) -> None:
        found = manifest[field]
        manifest[field] = [name] if isinstance(found, list) else {name: found["train"]}

    source = edited(make_source(tmp_path, "a", episodes=1, length=2), "manifest.json", rename)
    with pytest.raises(DataError, match="is not a folder of the source"):
        read_manifest(source)


def test_slices_that_name_files_elsewhere_are_not_merged(tmp_path: Path) -> None:
    from data_tools.convert.merge import _index
    from stamo_dist.errors import DataError

    def rename(index: Any) -> None:
        index["shards"][0]["raw_data"]["basename"] = "../../secret"

    source = edited(make_source(tmp_path, "a", episodes=1, length=2), "train/front/index.json", rename)
    with pytest.raises(DataError, match="is not a file name"):
        _index(source / "train/front")
    shutil.rmtree(source)
