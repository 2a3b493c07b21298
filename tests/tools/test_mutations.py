"""Datasets with one fault in their metadata: read right, or refused or skipped by one message with file and field.

STAMO_MUTATIONS=2000 (of all formats together) and STAMO_MUTATIONS_SEED=7 try more, and others.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutated_sets import TINY, Tiny
from mutations import Field, Mutation, mutations
from outcomes import Outcome, outcome, problems

pytest.importorskip("zarr", reason="needs the [zarr] extra: pip install -e '.[zarr]'")
TOTAL = int(os.environ.get("STAMO_MUTATIONS", "220"))
SEED = int(os.environ.get("STAMO_MUTATIONS_SEED", "0"))


@dataclass(frozen=True)
class Made:
    """A tiny source on disk, what it is converted to, and every mutation by file and field."""

    tiny: Tiny
    root: Path
    whole: Outcome
    faults: dict[str, dict[Field, list[Mutation]]]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    return lambda name: make(name, tmp_path_factory.mktemp(name))


def make(name: str, folder: Path) -> Made:
    if name == "zarr-3" and version("zarr").startswith("2."):
        pytest.skip("zarr format 3: needs Python 3.11, for which zarr 3 is")
    tiny, root = TINY[name], folder / "whole"
    root.mkdir()
    tiny.make(root)
    whole = outcome(tiny, root, folder / "before")
    assert whole.error is None, whole.error
    assert len(whole.episodes) >= 2
    assert not whole.skipped
    return Made(tiny, root, whole, {file: mutations(root, file) for file in tiny.mutated})


def faults_of(made: Made, mutation: Mutation, folder: Path) -> list[str]:
    """What is wrong with the conversion of a mutated copy."""
    copy, out = folder / "copy", folder / "out"
    shutil.copytree(made.root, copy, copy_function=os.link)
    try:
        mutation.apply(copy)
        return list(problems(made.tiny, mutation, made.whole, outcome(made.tiny, copy, out)))
    finally:
        shutil.rmtree(copy)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder / ".out.partial", ignore_errors=True)


@pytest.mark.parametrize("name", TINY)
def test_mutated_metadata(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    source = made(name)
    drawn: Counter[str] = Counter()
    one = st.sampled_from(sorted(source.faults)).flatmap(
        lambda file: st.sampled_from(sorted(source.faults[file])).flatmap(
            lambda field: st.sampled_from(source.faults[file][field])
        )
    )

    @seed(SEED)
    @settings(
        max_examples=max(5, TOTAL // len(TINY)), derandomize=not SEED, database=None, deadline=None,
        phases=(Phase.generate,), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(one)
    def check(mutation: Mutation) -> None:
        drawn[mutation.kind] += 1
        assert not faults_of(source, mutation, tmp_path)

    check()
    print(f"{name}: {drawn.total()} mutations")
