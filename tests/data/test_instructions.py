"""Instructions by sample number, from columns: as a reading of every episode finds them, once for a mixture."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made import make_data, write_source

from stamo_dist.data import sources
from stamo_dist.data.episode_columns import read_columns
from stamo_dist.data.instructions import Instructions, episode_tables
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.schema import Episode, Manifest, Split
from stamo_dist.data.supervised import labelled_episodes
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import SourceConfig


def table(folder: Path, episodes: list[Episode]) -> Any:
    """The columns of a folder that holds them, and its manifest."""
    (folder / "train").mkdir(parents=True)
    lines = "".join(f"{episode.model_dump_json()}\n" for episode in episodes)
    (folder / "train" / "episodes.jsonl").write_text(lines + "\n")
    frames = episodes[-1].start + episodes[-1].length
    manifest = Manifest(
        name="x", source_format="x", image_size=32, cameras=["a", "b"], rate_hz=1, action_dim=0, proprio_dim=0,
        convention="", splits={"train": Split(episodes=len(episodes), frames=frames)},
    )  # fmt: skip
    return manifest, read_columns(folder, "train", len(episodes))


def drawn(draw: random.Random, texts: list[str]) -> list[Episode]:
    episodes, start = list[Episode](), 0
    for i in range(draw.randrange(1, 40)):
        length = draw.randrange(1, 9)
        later = {t: draw.choice(texts) for t in sorted(draw.sample(range(length), draw.randrange(length)))}
        instruction = draw.choice(texts)
        episodes.append(
            Episode(id=f"e{i}", start=start, length=length, instruction=instruction, later_instructions=later)
        )
        start += length
    return episodes


@pytest.mark.parametrize("seed", range(20))
def test_columns_find_what_a_reading_of_every_episode_does(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    tables, opened, used = dict[str, Any](), [], {}
    expected = list[tuple[str, bool]]()
    for name in ("one", "two", "three"):
        folders = []
        share, default = draw.choice([1, 0.2, 0.37]), f" the rest of {name} "
        used[name] = SimpleNamespace(labelled=share, instruction=default, split="train", cameras=["a"] * 2)
        tables[name] = []
        for n in range(draw.randrange(1, 3)):
            episodes = drawn(draw, ["push", "pull ", "", f"look at {name}"])
            tables[name].append(table(tmp_path / f"{name}{n}", episodes))
            folders.append(SimpleNamespace(path=name))
            for i, episode in enumerate(episodes):
                mine = int((i + 1) * Fraction(str(share))) > int(i * Fraction(str(share)))
                texts = [(episode.instruction_at(t) or default).strip() for t in range(episode.length)]
                expected += [(text, mine) for text in texts]
        opened.append(folders)
    data = SimpleNamespace(sources=used, views=1)
    found = Instructions(SimpleNamespace(data=data, sources=list(used), opened=opened), tables)  # type: ignore[arg-type]
    samples = torch.arange(len(expected))
    assert found.texts == sorted({text for text, _ in expected})
    assert [found.texts[i] for i in found.of(samples).tolist()] == [text for text, _ in expected]
    assert found.labelled(samples).tolist() == [mine for _, mine in expected]


def test_episodes_without_an_instruction_are_named(tmp_path: Path) -> None:
    episodes = [Episode(id=f"e{i}", start=4 * i, length=4, instruction="push" * (i % 2)) for i in range(9)]
    episodes[1] = episodes[1].model_copy(update={"later_instructions": {2: " "}})
    used = {"arm": SimpleNamespace(labelled=1, instruction=None, split="train", cameras=None)}
    opened = [[SimpleNamespace(path="here")]]
    mixture = SimpleNamespace(data=SimpleNamespace(sources=used, views=1), sources=["arm"], opened=opened)
    with pytest.raises(DataError) as refused:
        Instructions(mixture, {"arm": [table(tmp_path / "s", episodes)]})  # type: ignore[arg-type]
    assert str(refused.value) == (
        "data.sources.arm: 6 of 9 episodes of here have no instruction (e0, e1, e2, …); "
        "set data.sources.arm.instruction"
    )


def test_a_table_is_read_once_for_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "s", lengths=(3, 4))
    mixture = Mixture(make_data({"s": SourceConfig(path=str(tmp_path / "s"), instruction="x")}), seed=0, global_batch=2)
    read = list[str]()
    whole = sources.read_columns
    monkeypatch.setattr(sources, "read_columns", lambda *args: read.append(args[1]) or whole(*args))
    assert episode_tables(mixture) is episode_tables(mixture)
    assert read == ["train"]


@pytest.mark.parametrize("line", ["{", '{"id": "a", "start": 0}', '{"id": "a", "start": 0, "length": 0}', "\udcff"])
def test_a_damaged_table_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "episodes.jsonl").write_bytes(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(DataError, match=r"episodes.jsonl: not an episode table"):
        read_columns(tmp_path, "train")
    with pytest.raises(DataError, match="missing"):
        read_columns(tmp_path, "test")


@pytest.mark.parametrize("share", [1, 0.2, 0.5, 0.123456789012345, 1e-9, 0.9999999999999999])
def test_labelled_episodes_are_spread_evenly(share: float) -> None:
    exact = Fraction(str(share))
    expected = [int((i + 1) * exact) > int(i * exact) for i in range(2000)]
    assert labelled_episodes(2000, share).tolist() == expected
    assert labelled_episodes(0, share).tolist() == []


def test_columns_take_little_room(tmp_path: Path) -> None:
    episodes = [
        Episode(id=f"episode {i}", start=3 * i, length=3, instruction=f"push {i % 7}", meta={"a": [json.dumps(i)] * 9})
        for i in range(1000)
    ]
    _, columns = table(tmp_path / "s", episodes)
    arrays = [value for value in vars(columns).values() if isinstance(value, np.ndarray)]
    assert sum(value.nbytes for value in arrays) <= 24 * len(episodes)
    assert len(columns.texts) == 7
    assert columns.ids([3, 999]) == ["episode 3", "episode 999"]
