"""One finished toy run, made by the real command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import write_recipe


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, toy: SimpleNamespace, stamo: Callable[..., Any]) -> Path:
    """A run folder with the checkpoints of steps 2 and 4 and the export; tests copy it before they write."""
    recipe = write_recipe(tmp_path_factory.mktemp("trained") / "toy.yaml", toy.shards, toy.vae)
    stamo("train", recipe, "--set", "train.steps=4", "--set", "train.checkpoint.every=2", "--set", "train.ema=0.5")
    return recipe.parent / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")
