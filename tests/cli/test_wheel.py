"""With the wheel alone, from an empty folder, nothing of a checkout is missed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    "stamo_dist", "data_tools", "docs", "recipes", "slurm", "setup.py", "setup.cfg", "pyproject.toml", "README.md",
    "LICENSE",
)  # fmt: skip
Run = Callable[..., str]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what is needed for it."""
    root = tmp_path_factory.mktemp("wheel")
    (root / "src").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, root / "src" / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=root / "src", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, and of this one only the other packages."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # without the .pth files in it
    return venv


@pytest.fixture(scope="module")
def installed(venv: Path) -> Run:
    """Run `stamo`, or another program of the environment."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*words: object, at: Path, program: str = "stamo") -> str:
        done = subprocess.run(
            [venv / "bin" / program, *map(str, words)], cwd=at, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_the_wheel_takes_one_top_level_name_and_has_all_that_is_found_by_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"stamo_dist"}
    tops = {"data_tools", "docs", "recipes", "slurm"}
    there = [path for top in tops for path in (ROOT / top).rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in there if "__pycache__" not in path.parts}
    wanted = {f"stamo_dist/_shipped/{name}" for name in wanted}
    assert wanted == {name for name in names if name.startswith("stamo_dist/_shipped/")}


def test_from_an_empty_folder_to_a_trained_toy(installed: Run, tmp_path: Path) -> None:
    where = installed("-c", "import stamo_dist; print(stamo_dist.__file__)", at=tmp_path, program="python")
    assert "site-packages" in where
    installed("init", "mine", at=tmp_path)
    project = tmp_path / "mine"
    readme = (project / "README.md").read_text()
    lines = [line for line in readme.split("```")[1].splitlines() if line.startswith("stamo")]
    commands = [line.split("#")[0].split()[1:] for line in lines]
    assert len(commands) == 5
    for words in commands:
        short = ("--set", "train.steps=6", "--set", "train.checkpoint.every=3") if words[0] == "train" else ()
        installed(*words, *short, at=project)
    assert (project / "runs/tokenizer/exported.json").is_file()
    assert (project / "runs/tokenizer/report.html").is_file()
    about = json.loads((project / "runs/vae/env.json").read_text())
    assert (about["git_commit"], len(about["code"])) == (None, 64)


def test_recipes_and_profiles_are_found_by_name(installed: Run, tmp_path: Path) -> None:
    assert "comes with stamo" in installed("recipe", "list", at=tmp_path)
    for name in ("tokenizer_demo", "tokenizer_demo.yaml", "recipes/tokenizer_demo.yaml"):
        assert "_shipped/recipes/tokenizer_demo.yaml:" in installed("recipe", "show", name, at=tmp_path)
    asked = ("recipe", "check", "tokenizer_sim", "--offline", "--world-size", 8)
    assert installed(*asked, at=tmp_path).startswith("OK")
    installed("init", ".", at=tmp_path)
    shutil.rmtree(tmp_path / "slurm")
    installed("data", "convert", "libero", "raw/toy", "shards/toy", "--size", 64, at=tmp_path)
    assert "--partition=gpu" in installed("submit", "recipes/vae.yaml", "--cluster", "gpu", "--dry-run", at=tmp_path)
    assert "hdf5" in installed("data", "formats", at=tmp_path).lower()
    assert installed("demo", "--dry-run", at=tmp_path).count("$ ") == 14
    shown = installed("--help", at=tmp_path).partition("How to:")[2].strip()
    assert Path(shown).name == "index.md"
    assert Path(shown).is_file()


def test_a_foreign_data_tools_is_left_alone_and_not_taken(installed: Run, tmp_path: Path) -> None:
    (tmp_path / "data_tools").mkdir()
    (tmp_path / "data_tools/__init__.py").write_text("raise SystemExit('the user\\'s')")
    assert "hdf5" in installed("-m", "stamo_dist.cli", "data", "formats", at=tmp_path, program="python").lower()
    with pytest.raises(AssertionError, match="the user's"):
        installed("-c", "import stamo_dist, data_tools", at=tmp_path, program="python")


def test_a_users_repository_around_it_leaves_nothing_in_a_run(venv: Path, installed: Run, tmp_path: Path) -> None:
    """Not even where the user has committed the environment."""
    (venv / "notes.txt").write_text("\n")
    author = ("-c", "user.name=u", "-c", "user.email=u@example.org")
    for command in (("init", "-q"), ("add", "-f", "notes.txt", "lib"), (*author, "commit", "-qm", "mine")):
        subprocess.run(["git", "-C", venv, *command], check=True)
    head = subprocess.run(["git", "-C", venv, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    (venv / "notes.txt").write_text("PASSWORD=s3cret\n")
    shutil.move(str(venv / "notes.txt"), venv / "lib/notes.txt")
    run = tmp_path / "run"
    snap = "from stamo_dist.launch.record import take_snapshot as t; from stamo_dist.run import code; "
    snap += f"t({str(run)!r}, None); print(code.git_commit(), code.code_version(), code.git_diff())"
    found = installed("-c", snap, at=tmp_path, program="python")
    assert re.fullmatch(r"None 0\.1\.0, code [0-9a-f]{12} b''\n", found)
    (snapshot,) = run.glob("launch/snapshots/*")
    assert (snapshot / "code/GIT_COMMIT").read_text() == ""
    assert (snapshot / "code/data_tools/cli.py").is_file()
    assert not (snapshot / "code/stamo_dist/_shipped").exists()
    for path in run.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"s3cret" not in content
        assert head.strip().encode() not in content
    copy = "import sys; sys.path.insert(0, sys.argv[1]); from stamo_dist.run import code; print(code.code_version())"
    again = installed("-c", copy, snapshot / "code", at=tmp_path, program="python")
    assert again.strip() == found.removeprefix("None ").removesuffix(" b''\n"), (
        "the copy is known as what was installed"
    )
