"""Every command of README and docs runs, one after the other, and each uses what those before it made.

README on what `make demo` leaves, in a terminal of 80 columns; the others into a file, on that and on the runs and
shards that they speak of.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from pages import (
    ELSEWHERE,
    PAGES,
    RECIPES,
    ROOT,
    SIZE,
    Command,
    commands,
    make_sources,
    sources,
    write_examples,
    write_small,
)
from terminal import Shell, plain
from toy_policy import make_base
from warm import Warm

from stamo_dist.recipe.load import load
from stamo_dist.run.success import Success, Successes

EVERY = commands()
RUN = {command.page for command in EVERY if not command.elsewhere}
#: Runs that pages speak of, of the demo's.
RUNS = {
    "runs/my_run": "demo/runs/tokenizer", "runs/my_other_run": "demo/runs/tokenizer",
    "runs/tokenizer_sim": "demo/runs/tokenizer", "runs/my_policy": "demo/runs/policy_openvla_state",
}  # fmt: skip
MY_RECIPE = """\
extends: tokenizer_demo.yaml
name: mine
run_dir: runs/mine
optimizer: {schedule: wsd, decay_steps: 2}
"""
SHARDS = ("shards/libero", "shards/metaworld", "demo/shards/metaworld_few")


def test_what_is_run_elsewhere_is_still_there() -> None:
    unused = [pattern for pattern in ELSEWHERE if not any(re.match(pattern, c.text) for c in EVERY)]
    assert not unused
    files = re.findall(r"tests/[\w/.]+\w", " ".join(ELSEWHERE.values()))
    assert [file for file in files if not (ROOT / file).exists()] == []


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
        shell(folder, command.split())
    return folder


@pytest.fixture(scope="module")
def furnished(shell: Shell, after_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo leaves, with the runs and shards that the pages of docs/ take for granted."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(after_demo, folder, dirs_exist_ok=True)
    make_base(folder / "base")
    recipes = [*RECIPES.glob("*.yaml"), *write_examples(folder)]
    named = sources(load(path).recipe for path in recipes) | set(SHARDS)
    new = sorted(source for source in named if not (folder / source).exists())
    make_sources(folder, new, SIZE)
    for source in new:
        shell(folder, ["data", "stats", source])
    for recipe in ("policy_openvla_state_demo", "policy_oft_state_demo", "policy_openvla_state"):
        shell(folder, ["train", recipe])
    for run, made in RUNS.items():
        shutil.copytree(folder / made, folder / run)
    for run in ("runs/my_policy", "runs/policy_openvla_state"):
        measured = Success(step=2, success=50.0, low=9.0, high=91.0, trials=2)
        Successes(measured, measured).write(folder / run)
    (folder / "recipes/my_recipe.yaml").write_text(MY_RECIPE)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes as they are, with shards of their size, for commands that only plan."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(RECIPES, folder / "recipes")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    recipes = [load(path).recipe for path in [*sorted(RECIPES.glob("*.yaml")), *write_examples(folder)]]
    make_sources(folder, sources(recipe for recipe in recipes if recipe.data.image_size == 256), 256)
    return folder


def run_all(shell: Shell, page: str, folder: Path, checkout: Path, columns: int | None = None) -> None:
    for command in EVERY:
        if command.page == page and not command.elsewhere:
            where = checkout if command.only_plans else folder
            if command.text.startswith("stamo serve"):
                serve_and_stop(shell, where, command)
            elif command.text.startswith("stamo "):
                shell(where, command.words(), columns=columns, code=command.code)
            else:
                subprocess.run(["bash", "-ec", command.text], cwd=where, check=True)


def serve_and_stop(shell: Shell, where: Path, command: Command) -> None:
    """Until it answers, and then Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with shell.started(where, [*command.words(), "--port", str(port)]) as server:
        while server.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
                assert json.load(answer)["frames"]
                break
            time.sleep(0.1)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130, server.stdout.read_text()


@pytest.mark.parametrize(
    "words", ["runs demo/runs", "status demo/runs", "eval reconstruct demo/runs/tokenizer --frames 4"]
)
def test_tables_lose_no_column_on_80(words: str, shell: Shell, after_demo: Path) -> None:
    wide, narrow = (shell(after_demo, words.split(), columns=columns) for columns in (200, 80))
    heading = next(line for line in plain(wide).splitlines() if re.match(r"┃|run  ", line))
    columns = [name for name in re.split(r"\s{2,}|\s*┃\s*", heading.strip()) if name]
    assert len(columns) >= 5
    assert [name for name in columns if not re.search(rf"\b{name}\b", plain(narrow))] == []


@pytest.mark.sim
def test_readme_in_a_terminal(shell: Shell, after_demo: Path, checkout: Path) -> None:
    run_all(shell, "README", after_demo, checkout, columns=80)
    assert (after_demo / "demo/runs/doors/report.html").stat().st_size < 4e6


@pytest.mark.parametrize("page", [page.stem for page in PAGES if page.stem in RUN and page.stem != "README"])
def test_the_page(page: str, shell: Shell, furnished: Path, checkout: Path) -> None:
    run_all(shell, page, furnished, checkout)
