"""A manifest and what describes its shards that do not belong together are refused by whoever reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_tools.convert.driver import Settings, run
from data_tools.look.check import check
from data_tools.look.stats import source_stats
from data_tools.simulators.drawn import write_drawn
from data_tools.stores.sync import sync
from stamo_dist.data import at_hand
from stamo_dist.data.schema import read_manifest
from stamo_dist.data.sources import open_camera, open_source
from stamo_dist.errors import DataError
from stamo_dist.recipe.load import load

INDEX, TABLE, MANIFEST = "train/top/index.json", "train/episodes.jsonl", "manifest.json"
OPTIONS = {"size": 32, "shard_bytes": 1, "val_fraction": 0.0, "processes": 1, "quiet": True}
Edit = Callable[[Any], Any]


def convert(raw: Path, out: Path, episodes: int) -> Path:
    write_drawn(raw / "a_demo.hdf5", episodes=episodes, size=32)
    run("libero", str(raw), str(out), Settings(**OPTIONS))
    return out


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    return convert(root / "raw", root / "shards", 4)


def edit_json(change: Edit) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content, sort_keys=True))

    return edit


def swap(index: Any) -> None:
    index["shards"][0], index["shards"][1] = index["shards"][1], index["shards"][0]


def forget_prefixes(index: Any) -> None:
    index["prefixes"] = {}


def unlist(manifest: Any) -> None:
    del manifest["checksums"]["train/top/shard.00003.mds"]
    forget_prefixes(manifest)


def other_sum(manifest: Any) -> None:
    manifest["checksums"]["train/top/shard.00001.mds"] = "0" * 64
    forget_prefixes(manifest)


def add(index: Any) -> None:
    index["shards"][3] = index["shards"][2]


CASES = {
    "an index in another order": (INDEX, edit_json(swap), "was changed since the manifest was written"),
    "an index that is cut": (INDEX, lambda p: p.write_bytes(p.read_bytes()[:-200] + b'}], "version": 2}'), "index"),
    "a shard the manifest does not list": (MANIFEST, edit_json(unlist), "lists shard.00003.mds, which the manifest"),
    "another checksum": (MANIFEST, edit_json(other_sum), "says another sha256 of shard.00001.mds than the manifest"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_command_takes_it(good: Path, tmp_path: Path, case: str) -> None:
    name, damage, says = CASES[case]
    source = tmp_path / "source"
    shutil.copytree(good, source)
    damage(source / name)
    report = check(str(source), quiet=True, processes=1)
    assert not report.fine
    for refused in (
        lambda: source_stats(source),
        lambda: sync(str(source), str(tmp_path / "copy"), quiet=True),
        lambda: open_camera(open_source(str(source)), "train", "top"),
    ):
        with pytest.raises(DataError, match=says):
            refused()
    assert not (tmp_path / "copy" / MANIFEST).exists()
    (tmp_path / "r.yaml").write_text(
        f"data: {{image_size: 32, sources: {{a: {{path: {source}}}}}}}\n"
        "train: {steps: 1, global_batch: 1, micro_batch: 1}\n"
    )
    (misfit,) = at_hand.look(load(tmp_path / "r.yaml").recipe.data)
    assert says in misfit.text


def test_names_twice_without_a_checksum_of_the_index(good: Path, tmp_path: Path) -> None:
    """As in sources that earlier versions wrote."""
    source = tmp_path / "source"
    shutil.copytree(good, source)
    edit_json(forget_prefixes)(source / MANIFEST)
    open_camera(open_source(str(source)), "train", "top")
    edit_json(add)(source / INDEX)
    with pytest.raises(DataError, match=r"names a shard twice: shard\.00002\.mds"):
        open_camera(open_source(str(source)), "train", "top")
    with pytest.raises(DataError, match=r"the manifest lists shard\.00003\.mds, which it does not"):
        source_stats(source)


def test_an_altered_table_is_found_and_not_copied(good: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(good, source)
    table = source / TABLE
    table.write_text(table.read_text().replace('"task":"a"', '"task":"b"', 1))
    (finding,) = [f for f in check(str(source), quiet=True, processes=1).findings if f.severity == "error"]
    assert (finding.check, finding.shard) == ("table", "episodes.jsonl")
    with pytest.raises(DataError, match=r"episodes\.jsonl: was changed since the manifest was written"):
        sync(str(source), str(tmp_path / "copy"), quiet=True)


def test_growth_is_no_disagreement(tmp_path: Path) -> None:
    source = convert(tmp_path / "raw", tmp_path / "shards", 3)
    before, index = (source / MANIFEST).read_text(), (source / INDEX).read_bytes()
    convert(tmp_path / "raw", source, 5)
    grown = read_manifest(source)
    assert len(grown.before) == 1
    now = open_source(str(source))
    then = open_source(str(source), growth=0)
    assert (open_camera(now, "train", "top").frames, open_camera(then, "train", "top").frames) == (200, 120)
    assert check(str(source), quiet=True, processes=1).fine
    copy = tmp_path / "reader"
    shutil.copytree(source, copy)
    (copy / MANIFEST).write_text(before)  # what a process that began before the growth has read
    assert open_camera(open_source(str(copy)), "train", "top").frames == 120
    (source / INDEX).write_bytes(index)
    with pytest.raises(DataError, match=r"has .* bytes, the manifest was written with at least"):
        open_camera(open_source(str(source)), "train", "top")


def test_training_says_it(good: Path, stamo: Callable[..., Any], toy: SimpleNamespace, tmp_path: Path) -> None:
    from toy import write_recipe

    for name in "ab":
        shutil.copytree(good, tmp_path / "shards" / name)
    edit_json(swap)(tmp_path / "shards/a" / INDEX)
    done = stamo("train", write_recipe(tmp_path / "toy.yaml", tmp_path / "shards", toy.vae), check=False)
    assert done.returncode == 2
    assert "data.sources.a: " in done.stderr
    assert "index.json: was changed since the manifest was written" in " ".join(done.stderr.split())
    assert not (tmp_path / "run/checkpoints").exists()
