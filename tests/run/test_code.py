"""Which code ran: the commit of the package's own repository, and of no other one's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASK = "from stamo_dist.run.code import *; print(git_commit(), code_version(), git_diff(), sep='\\n')"


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=u", "-c", "user.email=u@example.org", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit_all(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "all")
    return git(folder, "rev-parse", "HEAD")


def asked(folder: Path, **environment: str) -> list[str]:
    """Commit, version and diff of the package in `folder`."""
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", ASK], cwd="/", env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A copy of the package and what its repository has at its top."""
    top = tmp_path / "outer" / "own"
    for name in ("stamo_dist", "data_tools"):
        shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "setup.cfg", top / "setup.cfg")
    return top


def test_in_its_own_repository_the_commit_and_what_is_not_committed(own: Path, tmp_path: Path) -> None:
    head = commit_all(own)
    assert asked(own) == [head, head, "b''"]
    with (own / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    commit, version, diff = asked(own)
    assert commit == version == f"{head}+"
    assert "+# changed" in diff
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("a")
    commit_all(tmp_path / "other")
    other = {"GIT_DIR": str(tmp_path / "other/.git"), "GIT_WORK_TREE": str(tmp_path / "other")}
    assert asked(own, **other) == [commit, version, diff], "git's variables name another repository"


def test_in_a_repository_around_it_version_and_hash(own: Path) -> None:
    (own.parent / "secret.txt").write_text("\n")
    commit_all(own.parent)  # as a copy that was committed to a larger one
    (own.parent / "secret.txt").write_text("s3cret\n")
    commit, version, diff = asked(own)
    assert (commit, diff) == ("None", "b''")
    assert version.startswith("0.1.0, code ")
    with (own / "data_tools/cli.py").open("a") as file:
        file.write("# changed\n")
    assert asked(own)[1] != version


def test_a_repository_of_which_it_is_no_part(own: Path) -> None:
    (own / ".gitignore").write_text("stamo_dist/\ndata_tools/\n")
    commit_all(own)
    assert asked(own)[0] == "None"
