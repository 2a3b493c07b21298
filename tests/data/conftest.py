"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from made import make_data, write_source

from stamo_dist.recipe.data import Data, SourceConfig


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Data]:
    """A function that makes the `data` section of two sources, a (33 frames, two cameras) and b (80 frames)."""
    root = tmp_path_factory.mktemp("sources")
    write_source(root / "a", cameras=("front", "wrist"))
    write_source(root / "b", lengths=(10, 30, 21, 19))

    def make(a: float = 1.0, b: float = 1.0, **changes: Any) -> Data:
        sources = {"a": SourceConfig(path=str(root / "a"), weight=a), "b": SourceConfig(path=str(root / "b"), weight=b)}
        return make_data(sources, **changes)

    return make
