"""The pip commands in messages are such as work where they are printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stamo_dist import extras
from stamo_dist.words import counted

ROOT = Path(__file__).parents[2]


def test_a_checkout_is_installed_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert extras.how_to_install("sim").endswith("pip install -e '.[sim]'")
    monkeypatch.chdir(tmp_path)
    assert extras.how_to_install("sim").endswith(f"pip install -e '{ROOT}[sim]'")


def test_elsewhere_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages" / "stamo_dist" / "extras.py"))
    said = extras.how_to_install("ros")
    assert "stamo-dist" not in said
    assert said.endswith(" install 'rosbags<0.12,>=0.11'")


def test_pip_is_that_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"{sys.executable} -m pip install" in extras.how_to_install("sim")


def test_nouns_agree_with_their_number():
    assert [counted(n, "run") for n in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
    assert [counted(n, "process") for n in (1, 3)] == ["1 process", "3 processes"]
