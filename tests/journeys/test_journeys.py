"""A chosen part of the matrix that `make test-matrix` walks whole: every strategy, every stage, every kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import Ranks
from journey import STRATEGIES, Variant, straight, variants, walk

CHOSEN = (
    ("vae", "zero3", 2), ("tokenizer", "hsdp", 3), ("tokenizer, cached", "zero1", 1), ("tokens, video", "zero3", 2),
    ("parallel tokens, cached", "fsdp", 1), ("regression, video", "zero2", 2), ("diffusion, cached, video", "ddp", 3),
    ("diffusion", "fsdp", 2),
)  # fmt: skip


@pytest.fixture(scope="module")
def every(toy: SimpleNamespace, toy_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variant]:
    """On sources of its own, because caches are written beside them."""
    own = tmp_path_factory.mktemp("own")
    shards, policy = shutil.copytree(toy.shards, own / "shards"), shutil.copytree(toy_policy, own / "policy")
    return variants(shards, toy.vae, policy)


@pytest.mark.parametrize(("name", "strategy", "processes"), CHOSEN)
def test_from_the_start_to_a_clean_end(
    every: dict[str, Variant], ranks: Ranks, tmp_path: Path, name: str, strategy: str, processes: int
) -> None:
    expected = straight(ranks, every[name], tmp_path / "straight")
    walked = walk(ranks, name, every[name], strategy, processes, tmp_path / "walked", expected)
    assert not walked.problem, walked.problem


def test_the_chosen_part_has_every_strategy_and_every_kind(every: dict[str, Variant]) -> None:
    assert {strategy for _, strategy, _ in CHOSEN} == set(STRATEGIES)
    assert {name.partition(",")[0] for name, _, _ in CHOSEN} == {name.partition(",")[0] for name in every}
