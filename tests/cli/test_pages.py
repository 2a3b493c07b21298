"""Every `stamo` command on a page is one the program understands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import stamo_dist
from stamo_dist.cli.app import app
from stamo_dist.cli.help import GROUPS
from stamo_dist.recipe.load import dump, load
from stamo_dist.shipped import page as shipped_page

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


def examples(command, name="stamo"):
    """(command, example) of every help page."""
    for text in re.findall(r"Example: (stamo .*?)(?:\n\n|$)", command.help or "", re.DOTALL):
        yield name, " ".join(text.split()).replace("$SLURM_ARRAY_TASK_ID", "3")
    for child in getattr(command, "commands", {}).values():
        yield from examples(child, f"{name} {child.name}")


EXAMPLES = [*examples(typer.main.get_command(app)), *(("stamo", example) for _, example in GROUPS.values())]


def test_help_has_every_command_once_and_whole():
    said = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    for name in typer.main.get_command(app).commands:
        assert len(re.findall(rf"^  {name}  ", said, re.MULTILINE)) == (name != "doctor-probe"), name
    assert "..." not in said.partition("Options:")[2]
    assert said.splitlines()[-1] == f"How to: {shipped_page('index.md')}", "whole, however long"
    assert "Others" not in said, "a new command belongs to a group"
    assert (
        "..." not in CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "80"}).output.partition("Options:")[2]
    )


def test_version_says_what_a_report_of_a_fault_needs():
    said = CliRunner().invoke(app, ["--version"]).output
    assert said.startswith(f"stamo-dist {stamo_dist.__version__}")
    assert f"torch {version('torch')}," in said
    assert "CUDA" in said


@pytest.mark.parametrize(("page", "text"), [*commands(), *EXAMPLES])
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


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("eval", "reconstruct", "{nothing}"), "not a run folder"),
        (("eval", "reconstruct", "{vae}"), "its recipe trains the vae stage; give the run folder of a tokenizer"),
        (("eval", "rollout", "{vae}", "--tasks", "reach-v3"), "give the run folder of a policy"),
        (("eval", "during", "{vae}", "3"), "give the run folder of a policy"),
        (("serve", "{vae}"), "its recipe trains the vae stage; give the run folder of a policy"),
        (("serve", "nosuchrun"), "nosuchrun: no such folder; give the run folder of a policy"),
        (("serve", "tests/nosuchrun"), "tests/nosuchrun: no such folder; give the run folder of a policy"),
    ],
)
def test_a_wrong_folder_is_refused_before_torch_is_imported(command, says, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "resolved.yaml").write_text(dump(load(ROOT / "recipes" / "vae_demo.yaml").recipe))
    words = [word.format(nothing=tmp_path, vae=tmp_path / "vae") for word in command]
    program = "import sys, stamo_dist.cli\nsys.modules['torch'] = None\nstamo_dist.cli.main()"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
