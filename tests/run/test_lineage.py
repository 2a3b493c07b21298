"""Where a run's weights come from: recorded, read again, and never in a run's way."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from toy import write_recipe

from stamo_dist.run.lineage import PARENT, Parent, ancestors, lines, read, write


@pytest.mark.parametrize(
    "parent",
    [
        Parent("init", "/runs/sim", 4000, "averaged"),
        Parent("branch", "/runs/sim", 4000),
        Parent("resume", "/runs/sim", 4000),
        Parent("init", "owner/name@abc"),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, parent: Parent) -> None:
    write(tmp_path, Parent("init", "another"))
    write(tmp_path, parent)
    assert read(tmp_path) == parent


def test_most_runs_have_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path) is None
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        b'{"kind": "init", "run": "/r',
        b"",
        b"[1, 2]",
        b"\xff\xfe",
        b'"text"',
        b'{"kind": "other", "run": "/runs/a"}',
        b'{"kind": "init", "run": 3}',
        b'{"kind": "init", "run": "/runs/a", "step": "x"}',
        b'{"kind": ["init"], "run": "/runs/a"}',
        b'{"kind": "init", "run": "/runs/a", "weights": "best"}',
    ],
)
def test_a_torn_or_foreign_file_is_named_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / PARENT).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) is None
    assert str(tmp_path / PARENT) in caplog.text


def test_going_on_from_another_run_s_checkpoint_is_recorded(toy, ranks, tmp_path) -> None:
    first, second = (write_recipe(tmp_path / name / "toy.yaml", toy.shards, toy.vae) for name in ("first", "second"))
    few = ["--set", "train.checkpoint.every=2"]
    ranks(1, "train", first, *few, "--set", "train.steps=4")
    run = tmp_path / "second/run"
    ranks(
        1, "train", second, *few, "--set", "train.steps=6", "--resume", tmp_path / "first/run/checkpoints/step_00000002"
    )
    assert read(run) == Parent("resume", str(tmp_path / "first/run"), 2)
    for own in ("auto", run, run / "checkpoints/step_00000004"):
        ranks(1, "train", second, *few, "--set", "train.steps=6", "--resume", own)
        assert read(run) == Parent("resume", str(tmp_path / "first/run"), 2)
    assert read(tmp_path / "first/run") is None


def test_runs_report_and_card_tell_the_lineage(toy, ranks, stamo, tmp_path) -> None:
    """A child, a grandchild and one that was branched off."""
    folder = tmp_path / "runs"
    few = ["--set", "train.steps=2", "--set", "train.checkpoint.every=2"]
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    before = []
    for name in ("first", "second", "third"):
        own = ["--set", f"run_dir={folder / name}", "--set", f"name={name}"]
        ranks(1, "train", recipe, *few, *own, *before)
        before = ["--set", f"init_from={folder / name}"]
    write(folder / "third", Parent("branch", str(folder / "second"), 2))

    printed = stamo("runs", folder, "--tree").stdout.splitlines()
    assert [line.lstrip(" └─├│").split()[0] for line in printed] == ["first", "second", "third"]
    assert "init_from step 2" in printed[1]
    assert "branch step 2" in printed[2]
    facts = json.loads(stamo("runs", folder, "--json").stdout)
    parent = {"kind": "init", "run": str(folder / "first"), "step": 2, "weights": "raw"}
    assert {run["name"]: run["parent"] for run in facts}["second"] == parent

    page = Path(stamo("report", folder / "second", "--out", tmp_path / "page.html") and tmp_path / "page.html")
    stamo("export", folder / "second", tmp_path / "model")
    for text in (page.read_text(), (tmp_path / "model/README.md").read_text()):
        assert f"it began with the weights of {folder / 'first'}, step 2, raw weights" in text
        assert "third branched off it at step 2" in text

    shutil.rmtree(folder / "first")
    printed = stamo("runs", folder, "--tree").stdout.splitlines()
    assert printed[0] == f"{folder / 'first'} (moved or removed)"
    assert lines(folder / "second")[0].endswith("(moved or removed)")


def test_a_circle_ends(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, Parent("init", str(tmp_path / other), 1))
    assert [Path(parent.run).name for parent in ancestors(tmp_path / "a")] == ["b", "a"]
