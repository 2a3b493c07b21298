"""Every `stamo` command on a page is one the program understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from stamo_dist.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|console)?\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = line.strip().removeprefix("$ ").split("#")[0].strip()
                if text.startswith("stamo "):
                    found.append((page.name, text))
    return found


@pytest.mark.parametrize(("page", "text"), commands())
def test_command_parses(page, text):
    command = typer.main.get_command(app)
    words = shlex.split(text)[1:]
    context = command.make_context("stamo", list(words))
    while hasattr(command, "get_command"):  # a group
        name = words.pop(0)
        following = command.get_command(context, name)
        assert following is not None, f"{page}: no command {name!r} in: {text}"
        command = following
    context = command.make_context(text, words)
    assert context.params is not None


def test_a_user_error_has_no_traceback(stamo, tmp_path):
    result = stamo("train", tmp_path / "missing.yaml", check=False)
    assert result.returncode == 2
    assert "missing.yaml" in result.stderr
    assert "Traceback" not in result.stderr
