"""Every command of README and docs runs, one after the other, and each uses what those before it made.

README on what `make demo` leaves, in a terminal of 80 columns; the others into a file, on that and on the runs and shards
that they speak of.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import groupby
from pathlib import Path

import pytest
from pages import ELSEWHERE, RECIPES, ROOT, SIZE, Command, commands, make_sources, write_small
from terminal import Shell
from toy_policy import make_base
from warm import Warm

from stamo_dist.run.success import Success, Successes

EVERY = commands()
#: Runs that pages speak of, of the demo's.
RUNS = {
    "runs/my_run": "demo/runs/tokenizer", "runs/my_other_run": "demo/runs/tokenizer",
    "runs/tokenizer_sim": "demo/runs/tokenizer", "runs/my_policy": "demo/runs/policy_openvla_state",
}  # fmt: skip
SHARDS = ("shards/libero", "shards/metaworld", "demo/shards/metaworld_few")


def test_what_is_run_elsewhere_is_still_there() -> None:
    unused = [pattern for pattern in ELSEWHERE if not any(re.match(pattern, c.text) for c in EVERY)]
    assert not unused


@pytest.fixture(scope="module")
def shell(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(warm, tmp_path_factory.mktemp("said"))


@pytest.fixture(scope="module")
def after_demo(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes, and what `make demo` leaves."""
    folder = tmp_path_factory.mktemp("demo")
    write_small(folder)
    make_sources(folder, ("demo/shards/libero", "demo/shards/metaworld"), SIZE)
    for command in (
        "data stats demo/shards/libero", "data stats demo/shards/metaworld", "train vae_demo", "encode tokenizer_demo",
        "train tokenizer_demo", "eval reconstruct demo/runs/tokenizer --frames 8", "report demo/runs/tokenizer",
    ):  # fmt: skip
        shell(folder, command.split(), check=True)
    return folder


@pytest.fixture(scope="module")
def furnished(shell: Shell, after_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo leaves, with the runs and shards that the pages of docs/ take for granted."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(after_demo, folder, dirs_exist_ok=True)
    make_base(folder / "base")
    sources = write_small(folder) | set(SHARDS)
    new = sorted(source for source in sources if not (folder / source).exists())
    make_sources(folder, new, SIZE)
    for source in new:
        shell(folder, ["data", "stats", source], check=True)
    for recipe in ("policy_openvla_state_demo", "policy_openvla_state"):
        shell(folder, ["train", recipe], check=True)
    for run, made in RUNS.items():
        shutil.copytree(folder / made, folder / run)
    for run in ("runs/my_policy", "runs/policy_openvla_state"):
        measured = Success(step=2, success=50.0, low=9.0, high=91.0, trials=2)
        Successes(measured, measured).write(folder / run)
    (folder / "recipes/my_recipe.yaml").write_text("extends: tokenizer_demo.yaml\nname: mine\nrun_dir: runs/mine\n")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes as they are, with shards of their size, for commands that only plan."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(RECIPES, folder / "recipes")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    return folder


def of_page(page: str) -> list[Command]:
    return [c for c in EVERY if c.page == page and not c.elsewhere]


def run_all(shell: Shell, some: list[Command], folder: Path, checkout: Path, columns: int | None = None) -> None:
    for command in some:
        where = checkout if command.only_plans else folder
        if command.text.startswith("stamo "):
            shell(where, command.words(), columns=columns, check=True)
        else:
            subprocess.run(["bash", "-ec", command.text], cwd=where, check=True)


@pytest.mark.parametrize("page", [page for page, _ in groupby(EVERY, lambda c: c.page) if page != "README" and of_page(page)])
def test_the_page(page: str, shell: Shell, furnished: Path, checkout: Path) -> None:
    run_all(shell, of_page(page), furnished, checkout)
