"""Datasets that grow, or change: what is new is added, who reads notices nothing, and no episode changes sides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_tools.convert import merge as merging
from data_tools.convert.driver import Settings, convert, run
from data_tools.convert.plan import make_plan
from data_tools.look.check import check
from data_tools.stores.sync import sync
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.schema import read_episodes, read_manifest
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import Data

OPTIONS = {"size": 32, "val_fraction": 0.3, "quiet": True, "processes": 1, "shard_bytes": 20_000}


@pytest.fixture
def raw(tmp_path: Path, cut: Callable[..., Path]) -> Path:
    for name in ("b", "c"):
        cut(tmp_path / "raw" / f"{name}.hdf5")
    return tmp_path / "raw"


def grow(raw: Path, cut: Callable[..., Path]) -> None:
    """Before and after what is there."""
    for name in ("a", "d"):
        cut(raw / f"{name}.hdf5")


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def ids(out: Path, split: str) -> list[str]:
    return [e.id for e in read_episodes(out, split)]


def mixture(out: Path, **growth: list[int]) -> Mixture:
    data = Data.model_validate({"image_size": 32, "sources": {"x": {"path": str(out)}}})
    return Mixture(data, seed=0, global_batch=4, growth=growth)


def test_what_is_new_is_added(tmp_path: Path, raw: Path, cut: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    convert("libero", raw, out, **OPTIONS)
    before, was, held = files(out), mixture(out), ids(out, "val")
    grow(raw, cut)
    manifest, done = convert("libero", raw, out, **OPTIONS)
    assert done
    assert (manifest.as_of(0).episodes, manifest.episodes) == (6, 12)
    after = files(out)
    assert {k: v for k, v in before.items() if ".mds" in k}.items() <= after.items(), "old shards are as they were"
    assert [e.model_dump() for e in read_episodes(out, "train", 2)] == [
        e.model_dump() for e in read_episodes(out, "train")[:2]
    ]
    assert ids(out, "val")[: len(held)] == held
    convert("libero", raw, tmp_path / "anew", **OPTIONS)
    assert set(ids(out, "val")) == set(ids(tmp_path / "anew", "val")), "as if it had been there from the first"
    assert not [f for f in check(str(tmp_path / "anew"), quiet=True).findings if f.severity == "error"]

    assert mixture(out).num_samples > was.num_samples
    pinned = mixture(out, x=[0])
    assert (pinned.fingerprint, pinned.num_samples) == (was.fingerprint, was.num_samples)
    assert "has grown by" in pinned.notes[0]

    assert convert("libero", raw, out, **OPTIONS) == (manifest, False)
    assert files(out) == after
    assert not [f for f in check(str(out), quiet=True).findings if f.severity == "error"]


def test_a_reader_is_disturbed_at_no_moment(
    tmp_path: Path, raw: Path, cut: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each of the files that it replaces, and run again: the same as undisturbed."""
    out, whole = tmp_path / "out", tmp_path / "whole" / "out"
    for folder in (out, whole):
        convert("libero", raw, folder, **OPTIONS)
    was = mixture(out).fingerprint
    grow(raw, cut)
    convert("libero", raw, whole, **OPTIONS)
    honest = merging._replace
    for allowed in range(len(read_manifest(whole).splits) * 2):
        left = allowed

        def replace(path: Path, text: str) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            honest(path, text)

        monkeypatch.setattr(merging, "_replace", replace)
        with pytest.raises(KeyboardInterrupt):
            convert("libero", raw, out, **OPTIONS)
        assert mixture(out).fingerprint == was
    monkeypatch.setattr(merging, "_replace", honest)
    convert("libero", raw, out, **OPTIONS)
    assert files(out) == files(whole)
    assert sorted(os.listdir(tmp_path)) == ["out", "raw", "whole"]


def test_a_copy_is_added_to(tmp_path: Path, raw: Path, cut: Callable[..., Path]) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    convert("libero", raw, out, **OPTIONS)
    sync(str(out), str(copy), quiet=True)
    shards = len([name for name in files(copy) if name.endswith(".mds")])
    grow(raw, cut)
    convert("libero", raw, out, **OPTIONS)
    done = sync(str(out), str(copy), quiet=True)
    assert done.skipped == shards
    assert mixture(copy).fingerprint == mixture(out).fingerprint
    other = tmp_path / "other"
    convert("libero", raw, other, **{**OPTIONS, "size": 48})
    with pytest.raises(DataError, match="holds another source or conversion"):
        sync(str(other), str(copy), quiet=True)


def test_an_array_adds_together(tmp_path: Path, raw: Path, cut: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    convert("libero", raw, out, slice_frames=1, **OPTIONS)
    grow(raw, cut)
    first = run("libero", raw, out, Settings(**OPTIONS, slice_frames=1, num_slices=2, slice=0))
    assert first.manifest is None
    assert first.missing
    second = run("libero", raw, out, Settings(**OPTIONS, slice_frames=1, num_slices=2, slice=1))
    assert second.manifest is not None
    assert second.manifest.episodes == 12


def test_what_is_more_than_growth_is_named(tmp_path: Path, raw: Path, cut: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    convert("libero", raw, out, **OPTIONS)
    before = files(out)
    grow(raw, cut)
    with h5py.File(raw / "b.hdf5", "r+") as file:
        file["data/demo_1/actions"][3] += 0.5
        del file["data/demo_2"]
    with pytest.raises(DataError, match="not only grown") as refused:
        convert("libero", raw, out, **OPTIONS)
    assert "b/demo_1: has other rows" in str(refused.value)
    assert "b/demo_2: is no longer there" in str(refused.value)
    assert "c/" not in str(refused.value)
    assert files(out) == before
    assert convert("libero", raw, out, overwrite=True, **OPTIONS)[0].episodes == 11


def test_a_dataset_that_was_only_touched_is_left_alone(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "out"
    convert("libero", raw, out, **OPTIONS)
    before = files(out)
    with h5py.File(raw / "b.hdf5", "r+") as file:
        file["data"].attrs["comment"] = "new"
    manifest, done = convert("libero", raw, out, **OPTIONS)
    assert not done
    assert not manifest.before
    assert {k: v for k, v in files(out).items() if k != "manifest.json"} == {
        k: v for k, v in before.items() if k != "manifest.json"
    }


def test_what_cannot_be_read_is_not_what_is_held_out(tmp_path: Path, raw: Path) -> None:
    options = {**OPTIONS, "val_fraction": 0.001}
    (chosen,) = make_plan("libero", raw, "x", Settings(**options)).splits["val"]
    name, demo = chosen.id.split("/")
    with h5py.File(raw / f"{name}.hdf5", "r+") as file:
        file[f"data/{demo}/actions"][2] = np.nan
    manifest, _ = convert("libero", raw, tmp_path / "out", **options)
    assert {split: of.episodes for split, of in manifest.splits.items()} == {"train": 4, "val": 1}
    assert [line.split(": ")[0] for line in manifest.skipped] == [chosen.id]
    assert any("none of the 1 episodes chosen could be read" in note for note in manifest.notes)
    assert convert("libero", raw, tmp_path / "out", **options) == (manifest, False)


def test_a_range_of_episodes(tmp_path: Path, raw: Path) -> None:
    options = {**OPTIONS, "val_fraction": 0}
    convert("libero", raw, tmp_path / "all", **options)
    convert("libero", raw, tmp_path / "some", episodes=(1, 3), **options)
    assert ids(tmp_path / "some", "train") == ids(tmp_path / "all", "train")[1:3]
    with pytest.raises(DataError, match="has 6; none is left"):
        convert("libero", raw, tmp_path / "none", episodes=(6, None), **options)
    with pytest.raises(DataError, match="a first number and a greater last"):
        convert("libero", raw, tmp_path / "none", episodes=(3, 2), **options)


def test_files_that_changed_are_seen(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By content where that is cheap or asked for, else by size and time."""

    def seen(**settings: bool) -> str:
        return make_plan("libero", raw, "x", Settings(**OPTIONS, **settings)).manifest.source_fingerprint

    small, whole = seen(), seen(hash_files=True)
    os.utime(raw / "b.hdf5", (1, 1))
    assert (seen(), seen(hash_files=True)) == (small, whole)
    monkeypatch.setattr("data_tools.convert.plan._CHEAP", 1000)
    timed = seen()
    assert timed.startswith("times ")
    os.utime(raw / "b.hdf5", (2, 2))
    assert seen() != timed
    assert seen(hash_files=True) == whole
