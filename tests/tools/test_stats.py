"""Statistics of real vectors beside numpy's, and what is kept of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from remade import read, remake
from typer.testing import CliRunner

from data_tools.convert.driver import convert
from data_tools.look.columns import ColumnShard, read_index
from data_tools.look.sketch import RELATIVE_ERROR, Moments, Quantiles
from data_tools.look.stats import source_stats
from data_tools.look_cli import register
from stamo_dist.data.schema import read_manifest
from stamo_dist.errors import DataError

REAL = "libero_spatial_task2_128.hdf5"
FRAMES = 75


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, sample_data: Callable[[str], Path]) -> Path:
    """75 real frames in several shards."""
    out = tmp_path_factory.mktemp("stats") / "libero"
    options = {"image_timing": "before", "cameras": ["agentview"]}
    convert("libero", sample_data(REAL), out, size=32, val_fraction=0, shard_bytes=1, options=options, quiet=True)
    return out


def between(values: np.ndarray, q: float) -> tuple[np.ndarray, np.ndarray]:
    """The order statistics around a quantile."""
    return tuple(np.quantile(values, q, axis=0, method=method) for method in ("lower", "higher"))  # type: ignore[return-value, call-overload]


def close(found: np.ndarray, values: np.ndarray, q: float) -> None:
    low, high = between(values, q)
    slack = RELATIVE_ERROR * np.maximum(np.abs(low), np.abs(high)) * 1.0001
    expected = np.quantile(values, q, axis=0)
    assert (np.abs(found - expected) <= slack).all()


def test_real_actions_and_proprio_are_as_numpy_has_them(source: Path) -> None:
    samples = read(source, "train", "agentview")
    stats = source_stats(source)
    assert stats == source_stats(source, processes=2)
    assert len(list((source / "train" / "agentview").glob("*.mds"))) == 3
    for column in ("action", "proprio"):
        values = np.stack([sample[column] for sample in samples]).astype(np.float64)
        found = stats[column]
        assert found.count == len(values) == FRAMES
        np.testing.assert_allclose(found.mean, values.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.std, values.std(0), rtol=1e-10)
        np.testing.assert_array_equal(found.min, values.min(0))
        np.testing.assert_array_equal(found.max, values.max(0))
        close(np.array(found.q01), values, 0.01)
        close(np.array(found.q99), values, 0.99)
    assert stats["action"].mask == [True] * 6 + [False]
    assert all(stats["proprio"].mask)


@pytest.mark.parametrize("spread", ["normal", "cauchy", "zeros", "tiny", "large"])
def test_quantiles_keep_their_bound_whatever_the_numbers(spread: str) -> None:
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.normal(3, 1, (5001, 3)),
        "cauchy": rng.standard_cauchy((5001, 3)),
        "zeros": rng.normal(size=(5001, 3)) * (rng.random((5001, 3)) > 0.99),
        "tiny": rng.normal(size=(5001, 3)) * 1e-30,
        "large": rng.normal(size=(5001, 3)) * 1e37,
    }[spread].astype(np.float32)
    parts = np.array_split(values, 7)
    whole, moments = Quantiles.of(parts[0]), Moments.of(parts[0])
    for part in parts[1:]:
        whole, moments = whole.merge(Quantiles.of(part)), moments.merge(Moments.of(part))
    exact = values.astype(np.float64)
    shares = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
    for share, found in zip(shares, whole.at(shares, moments), strict=True):
        close(found, exact, share)
    np.testing.assert_allclose(moments.std, exact.std(0), rtol=1e-9)
    assert whole.outside(np.full(3, -np.inf), np.full(3, np.inf)).tolist() == [0, 0, 0]
    low = np.quantile(exact, 0.1, axis=0) * 1.01 - 1e-33
    np.testing.assert_allclose(whole.outside(low, np.full(3, np.inf)), (exact < low).sum(0), atol=25)


def test_columns_are_what_streaming_reads(source: Path) -> None:
    index = read_index((source / "train/agentview/index.json").read_bytes(), "index.json")
    samples = iter(read(source, "train", "agentview"))
    for indexed in index:
        shard = ColumnShard(indexed.spec(source / "train/agentview" / indexed.name))
        mine = [next(samples) for _ in range(len(shard))]
        for column in ("action", "original_action", "proprio"):
            np.testing.assert_array_equal(shard.vectors(column), [s[column] for s in mine])
        for column in ("t", "length", "time"):
            np.testing.assert_array_equal(shard.vectors(column)[:, 0], [s[column] for s in mine])
        assert [value.decode() for value in shard.values("episode")] == [s["episode"] for s in mine]
        assert shard.values("image") == [s["image"] for s in mine]


def test_the_manifest_keeps_them_and_nothing_else_changes(source: Path, tmp_path: Path) -> None:
    copy = remake(source, tmp_path / "libero", lambda samples: samples)
    before = read_manifest(copy)
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["stats", str(copy), "--quiet"])
    assert result.exit_code == 0, result.output
    assert "gripper" in result.stdout
    assert "dx" in result.stdout
    after = read_manifest(copy)
    assert after.stats == source_stats(copy)
    assert after.model_copy(update={"stats": {}}) == before
    text = (copy / "manifest.json").read_text()
    assert json.loads(text)["stats"]["action"]["count"] == FRAMES
    assert not list(copy.glob(".manifest*"))


def test_what_cannot_be_computed_is_said(source: Path, tmp_path: Path) -> None:
    def spoil(samples: list) -> list:
        samples[30]["action"] = np.full(7, np.nan, np.float32)
        return samples

    copy = remake(source, tmp_path / "libero", spoil)
    with pytest.raises(DataError, match=r"train/agentview/shard.00000.mds: sample 30: action is not finite"):
        source_stats(copy)
    with pytest.raises(DataError, match="has no split 'test', only train"):
        source_stats(copy, "test")
    (copy / "train/agentview/shard.00000.mds").unlink()
    with pytest.raises(DataError, match="No such file"):
        source_stats(copy)
