"""Weights are realised, problems are listed, and the fingerprint notices changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made import make_data, write_source
from rich.console import Console

from stamo_dist.data.mixture import Mixture
from stamo_dist.data.table import mixture_picture, mixture_table
from stamo_dist.data.weights import report
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import Data, SourceConfig
from stamo_dist.recipe.sampling import Shuffle


def read(mixture: Mixture, steps: int) -> np.ndarray:
    return mixture.plan(0, steps).samples.reshape(-1)


def test_weights_become_shares_of_the_samples(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(a=3, b=1), seed=0, global_batch=8)
    order = read(mixture, 50)
    assert mixture.sources == ["a", "b"]
    assert np.bincount(mixture.source_of(order)).tolist() == [300, 100]
    # Source a has two cameras of 33 frames, all of which are drawn evenly.
    of_a = np.bincount(order[order < 66], minlength=66)
    assert of_a.min() >= 4
    assert of_a.max() <= 5


def test_natural_weights_and_temperature(two: Callable[..., Data]) -> None:
    shares = []
    for temperature in (1, 2, 1000):
        mixture = Mixture(two(a="natural", b="natural", temperature=temperature), seed=0, global_batch=8)
        shares.append(np.bincount(mixture.source_of(read(mixture, 1000)))[0] / 8000)
    natural, root = 66 / 146, 66**0.5 / (66**0.5 + 80**0.5)
    assert shares == pytest.approx([natural, root, 0.5], abs=1e-3)


def test_a_weight_changes_at_its_step(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(a={0: 1, 20: 3}, b=1), seed=0, global_batch=8)
    source = mixture.source_of(read(mixture, 60))
    assert np.bincount(source[:160]).tolist() == [80, 80]
    assert np.bincount(source[160:]).tolist() == [240, 80]
    assert (mixture.plan(30, 10).samples == mixture.plan(0, 60).samples[30:40]).all()


def test_several_folders_are_one_source(two: Callable[..., Data]) -> None:
    a, b = (source.path for source in two().sources.values())
    mixture = Mixture(make_data({"both": SourceConfig(path=[a, b])}), seed=0, global_batch=2)
    assert mixture.frames.tolist() == [146]
    assert sorted(read(mixture, 73).tolist()) == list(range(146))


def test_the_report_counts_what_the_run_reads(two: Callable[..., Data], tmp_path: Path) -> None:
    mixture = Mixture(two(a=3, b=1), seed=0, global_batch=8)
    order = read(mixture, 25)
    a, b = report(mixture, 25)
    assert [a.samples, b.samples] == np.bincount(mixture.source_of(order)).tolist()
    assert (a.requested, b.requested) == (0.75, 0.25)
    assert a.realised == pytest.approx(0.75, abs=0.01)
    assert a.epochs == pytest.approx(a.samples / 66)
    assert [a.unique, b.unique] == [len(set(order[order < 66].tolist())), len(set(order[order >= 66].tolist()))]
    assert not a.warnings
    assert not b.warnings
    assert mixture_picture(mixture, 25, tmp_path / "runs" / "mixture.png").stat().st_size > 5000


def test_starved_and_exhausted_sources_are_named(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(a=1, b=0.0002), seed=0, global_batch=8)
    a, b = report(mixture, 2000)
    assert "goes through it 242 times" in a.warnings[0]
    assert "one sample in" in b.warnings[0]
    assert "too small for a single sample" in report(mixture, 10)[1].warnings[0]
    console = Console(record=True, width=200)
    mixture_table([a, b], console)
    text = console.export_text()
    assert "99.98%" in text
    assert "a: the run goes through it" in text


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    good = write_source(tmp_path / "good", cameras=("front", "wrist"))
    (tmp_path / "empty").mkdir()
    unfinished = write_source(tmp_path / "unfinished")
    (unfinished / "manifest.json").unlink()
    damaged = write_source(tmp_path / "damaged")
    shards = sorted((damaged / "train" / "front").glob("shard.*"))
    shards[0].unlink()
    shards[1].write_bytes(b"short")
    uncounted = write_source(tmp_path / "uncounted")
    manifest = uncounted / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"frames":33', '"frames":34'))
    small = write_source(tmp_path / "small")
    manifest = small / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"image_size":32', '"image_size":64'))
    sources = {
        "missing": SourceConfig(path=str(tmp_path / "nowhere")),
        "empty": SourceConfig(path=str(tmp_path / "empty")),
        "unfinished": SourceConfig(path=str(unfinished)),
        "damaged": SourceConfig(path=str(damaged)),
        "uncounted": SourceConfig(path=str(uncounted)),
        "small": SourceConfig(path=str(small)),
        "good": SourceConfig(path=str(good), cameras=["front"]),
        "again": SourceConfig(path=f"{good}/../good", cameras=["front", "wrist"]),
        "camera": SourceConfig(path=str(good), cameras=["top"]),
        "split": SourceConfig(path=str(good), split="val", cameras=["front"]),
        "unused": SourceConfig(path=str(tmp_path / "nowhere"), weight=0),
    }
    with pytest.raises(DataError) as caught:
        Mixture(make_data(sources), seed=0, global_batch=8)
    text = str(caught.value)
    assert text.startswith("9 problems in the data:")
    for part in (
        "data.sources.missing:", "no such folder", "data.sources.empty:", "is empty", "data.sources.unfinished:",
        "never finished", "2 of 3 shards are missing or damaged: shard.00000.mds (missing), shard.00001.mds (5 bytes",
        "counts 33 frames, the manifest 34", "frames of 64 px, but data.image_size is 32",
        "data.sources.again: reads the same frames as data.sources.good", "has no camera 'top', only front, wrist",
        "has no split 'val', only train",
    ):  # fmt: skip
        assert part in text
    assert "unused" not in text


def test_the_fingerprint_follows_the_data_not_its_place(two: Callable[..., Data], tmp_path: Path) -> None:
    def fingerprint(data: Data, seed: int = 0, global_batch: int = 8) -> str:
        return Mixture(data, seed=seed, global_batch=global_batch).fingerprint

    data = two()
    one_camera = data.sources["a"].model_copy(update={"cameras": ["wrist"]})
    changed = {
        fingerprint(data),
        fingerprint(data, seed=1),
        fingerprint(data, global_batch=16),
        fingerprint(two(a=2)),
        fingerprint(two(shuffle=Shuffle(lanes=4))),
        fingerprint(two(shuffle=Shuffle(order="groups"))),
        fingerprint(two(shuffle=Shuffle(order="groups", block_size=64))),
        fingerprint(two(a={0: 1, 5: 2})),
        fingerprint(make_data({"a": one_camera, "b": data.sources["b"]})),
    }
    assert len(changed) == 9
    moved = shutil.copytree(data.sources["a"].path, tmp_path / "moved")
    assert fingerprint(make_data({"renamed": SourceConfig(path=str(moved)), "b": data.sources["b"]})) == fingerprint(
        data
    )
    write_source(moved, cameras=("front", "wrist"), lengths=(7, 12, 5, 8), exist_ok=True)
    assert fingerprint(make_data({"a": SourceConfig(path=str(moved)), "b": data.sources["b"]})) != fingerprint(data)
