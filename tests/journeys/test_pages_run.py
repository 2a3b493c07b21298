"""Every command of README and docs runs, one after the other, on toys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked import Ranks
from pages import ELSEWHERE, Command, commands, furnish, make_original, write_toys
from toy import write_recipe
from toy_policy import make_base, on_base, write_policy_recipe

EVERY = commands()


@pytest.fixture(scope="module")
def furnished(ranks: Ranks, toy: SimpleNamespace, toy_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    base = make_base(folder / "base")
    made = folder / "made"
    ranks(1, "train", write_recipe(made / "tokenizer" / "toy.yaml", toy.shards, toy.vae))
    ranks(1, "train", on_base(write_policy_recipe(made / "policy" / "toy.yaml", toy_policy), base))
    source = make_original(made)
    ranks(1, "data", "stats", source)
    write_toys(folder, source, toy_policy, base, toy.vae)
    furnish(folder, source, made / "tokenizer" / "run", made / "policy" / "run")
    return folder


def test_what_is_run_elsewhere_is_still_there() -> None:
    unused = [pattern for pattern in ELSEWHERE if not any(re.search(pattern, c.text) for c in EVERY)]
    assert not unused


def by_page() -> Iterator[tuple[str, list[Command]]]:
    for page, some in groupby(EVERY, lambda c: c.page):
        if here := [c for c in some if not c.elsewhere]:
            yield page, here


@pytest.mark.parametrize(("page", "some"), [pytest.param(*each, id=each[0]) for each in by_page()])
def test_the_page(page: str, some: list[Command], furnished: Path, ranks: Ranks) -> None:
    failed = []
    for command in some:
        code, said = ranks(1, *command.words(), check=False, timeout=120, cwd=furnished)
        if code or "Traceback" in said:
            failed.append(f"{command.text}\n  → {' '.join(command.words())}\n  {code}: {said[-1500:]}")
    assert not failed, f"{len(failed)} of {len(some)}:\n" + "\n".join(failed)
