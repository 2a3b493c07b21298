"""Canonical paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stamo_dist.data.at_hand import resolve
from stamo_dist.paths import canonical


def test_as_realpath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk" / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a")
    (tmp_path / "turn").symlink_to("link")
    (tmp_path / "round").symlink_to("round")
    monkeypatch.chdir(tmp_path / "link" / "b")
    absolute = [tmp_path / name for name in ("turn/b", "link/../x", "round/x", "link/")]
    for given in ("", ".", "..", "new", "~", "../../a", *absolute):
        assert canonical(given) == os.path.realpath(given)
    assert resolve("~/a") == os.path.realpath(Path.home() / "a")


def test_a_folder_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path, **how: asked.append(str(path)) or lstat(path, **how))
    for name in "abc":
        canonical(tmp_path / name / "manifest.json")
        canonical(tmp_path / name)
    assert len(asked) == len(set(asked))
    assert sum(path.startswith(str(tmp_path)) for path in asked) == 7
