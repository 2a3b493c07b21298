"""Converted source → LeRobot v3.0 → converted source: the same frames, numbers, texts, names, splits and rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy import make_source

pytest.importorskip("av", reason="needs the convert extra")

from data_tools.convert.driver import convert
from data_tools.export.episodes import walk
from data_tools.export.lerobot import export_lerobot
from data_tools.formats.lerobot import LerobotReader
from data_tools.look.each_shard import store_at
from stamo_dist.data.schema import EPISODES, partial_of, read_manifest
from stamo_dist.errors import DataError


def content(source: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(camera, episode) → its split, texts, numbers and frames."""
    manifest, found = read_manifest(source), {}
    for camera in manifest.cameras:
        for episode in walk(store_at(str(source)), manifest, camera):
            about = episode.about
            found[camera, about.id] = {
                "split": episode.split,
                "texts": [about.instruction_at(t) for t in range(about.length)],
                "time": episode.vectors("time").copy(),
                "action": episode.vectors("action").copy(),
                "proprio": episode.vectors("proprio").copy(),
                "frames": np.stack([frame.copy() for frame in episode.frames(manifest.image_size)]),
            }
    return found


def assert_comes_back(source: Path, folder: Path, error: float) -> None:
    """`error`: most mean difference of a frame's pixels."""
    exported = export_lerobot(str(source), folder / "lerobot", quiet=True)
    before = read_manifest(source)
    convert(
        "lerobot", folder / "lerobot", folder / "back", name=before.name, size=before.image_size, split_by="source",
        processes=1, quiet=True,
    )  # fmt: skip
    after, first, second = read_manifest(folder / "back"), content(source), content(folder / "back")
    assert (after.rate_hz, after.cameras, after.splits) == (before.rate_hz, before.cameras, before.splits)
    assert exported.episodes == before.episodes
    assert list(first) == list(second)
    for name, one in first.items():
        other = second[name]
        assert (one["split"], one["texts"]) == (other["split"], other["texts"])
        for column in ("action", "proprio"):
            np.testing.assert_array_equal(one[column], other[column])
        np.testing.assert_allclose(one["time"], other["time"], atol=1e-6)
        difference = np.abs(one["frames"].astype(int) - other["frames"]).mean((1, 2, 3))
        assert difference.max() < error, f"{name}: frame {difference.argmax()}"
        apart = np.abs(one["frames"][:, None].astype(int) - other["frames"][None, :]).mean((2, 3, 4))
        still = np.abs(np.diff(one["frames"].astype(int), axis=0)).mean((1, 2, 3)).min() < 1
        assert still or (apart.argmin(1) == np.arange(len(apart))).all(), "each frame is the one of its row"


def make_toy(root: Path) -> Path:
    """Two cameras, two splits, an instruction that changes within an episode."""
    noise = np.random.default_rng(0).normal(size=(8, 12, 3))
    source = make_source(
        root, "toy", cameras=("front", "wrist"), size=64, action=lambda e, t: noise[e, t].tolist(), shard_bytes=1 << 16
    )
    table = source / "train" / EPISODES
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    lines[0] |= {"instruction": "first", "later_instructions": {"5": "then"}}
    lines[1] |= {"instruction": "Überholen, s'il vous plaît"}
    for line in lines[2:]:
        line["instruction"] = "move the square"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    val = source / "val" / EPISODES
    others = [{**json.loads(line), "instruction": "move the square"} for line in val.read_text().splitlines()]
    val.write_text("".join(json.dumps(line) + "\n" for line in others))
    return source


def test_a_source_comes_back(tmp_path: Path) -> None:
    source = make_toy(tmp_path)
    assert_comes_back(source, tmp_path, error=6)
    info = json.loads((tmp_path / "lerobot/meta/info.json").read_text())
    assert info["splits"] == {"train": "0:4", "val": "4:8"}
    stats = json.loads((tmp_path / "lerobot/meta/stats.json").read_text())
    actions = np.concatenate([one["action"] for (camera, _), one in content(source).items() if camera == "front"])
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(0, dtype=np.float64), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], actions.std(0, dtype=np.float64), atol=1e-6)
    frames = np.concatenate([one["frames"] for (camera, _), one in content(source).items() if camera == "wrist"]) / 255
    found = stats["observation.images.wrist"]
    np.testing.assert_allclose(np.ravel(found["mean"]), frames.mean((0, 1, 2)), atol=1e-9)
    np.testing.assert_allclose(np.ravel(found["std"]), frames.std((0, 1, 2)), atol=1e-9)
    tasks = pq.read_table(tmp_path / "lerobot/meta/tasks.parquet")
    assert tasks.to_pylist()[:2] == [{"task_index": 0, "task": "first"}, {"task_index": 1, "task": "then"}]
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]


def test_sets_put_together_are_named_by_number(tmp_path: Path) -> None:
    export_lerobot(str(make_toy(tmp_path)), tmp_path / "lerobot", quiet=True)
    (table,) = (tmp_path / "lerobot/meta/episodes").rglob("*.parquet")
    rows = pq.read_table(table)
    column = rows.column_names.index("stamo/episode")
    pq.write_table(rows.set_column(column, "stamo/episode", pa.array(["toy-train-0"] * len(rows))), table)
    scan = LerobotReader(tmp_path / "lerobot").scan()
    assert [e.id for e in scan.episodes] == [f"episode_{i:06d}" for i in range(8)]
    assert "episodes are named by number: stamo/episode has toy-train-0 twice" in scan.notes


def test_official_episodes_come_back(sample_data: Callable[[str], Path], tmp_path: Path) -> None:
    root = sample_data("lerobot_v3_libero")
    convert(
        "lerobot", root, tmp_path / "shards", name="real", size=64, split_by="source", processes=1, quiet=True,
        options={"action_kind": "libero"},
    )  # fmt: skip
    assert_comes_back(tmp_path / "shards", tmp_path, error=5)


def test_what_is_there_or_half_written_is_never_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stamo: Callable[..., Any]
) -> None:
    source, out = make_toy(tmp_path), tmp_path / "out"
    partial_of(out).mkdir()
    (partial_of(out) / "left").write_text("by a killed one")
    shard = next((source / "val" / "wrist").glob("shard*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="shard"):
        export_lerobot(str(source), out, quiet=True)
    assert not out.exists()
    assert not partial_of(out).exists()
    shard.write_bytes(whole)
    said = stamo("data", "export", "lerobot", source, out)
    assert f"{out}: 8 episodes, 96 frames" in said.stdout
    assert not list(out.rglob("left"))
    again = stamo("data", "export", "lerobot", source, out, check=False)
    assert again.returncode == 2
    assert f"{out}: exists; give a folder that does not" in again.stderr
    assert stamo("data", "export", "rlds", source, tmp_path / "o", check=False).returncode == 2


@pytest.mark.parametrize("field", ["episodes", "frames"])
def test_a_source_that_contradicts_itself_is_refused(tmp_path: Path, field: str) -> None:
    source, out = make_toy(tmp_path), tmp_path / "out"
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["splits"]["val"][field] += 5
    (source / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json has .* val/episodes\.jsonl"):
        export_lerobot(str(source), out, quiet=True)
    assert not out.exists()
    (source / "val/episodes.jsonl").unlink()
    with pytest.raises(DataError, match=r"val/episodes\.jsonl: missing; `stamo data check` the source"):
        export_lerobot(str(source), out, quiet=True)
