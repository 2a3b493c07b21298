"""Wherever a command takes a run, it takes the run's name."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from stamo_dist.cli.app import app
from stamo_dist.errors import StamoError
from stamo_dist.run.registry import register

NO_RUN = "unknown: no run folder and no name of a run"
COMMANDS = (
    ("report", "RUN"), ("export", "RUN", "out"), ("serve", "RUN"), ("eval", "during", "RUN", "4"),
    ("eval", "probe", "RUN"), ("eval", "rollout", "RUN", "--benchmark", "libero", "--tasks", "spatial"),
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[: command.index("RUN")]))
def test_a_run_by_its_name(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "elsewhere" / "tried"
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text("[]\n")
    register(folder)
    unknown = "unknown: no such folder; give the run folder of a policy" if command[0] == "serve" else NO_RUN
    for name, expected in (("tried", "elsewhere/tried"), ("unknown", unknown)):
        done = CliRunner().invoke(app, [name if word == "RUN" else word for word in command])
        said = f"{done.output}{done.exception}"
        assert expected in said
        assert isinstance(done.exception, StamoError)
