"""`stamo env | completion | init | demo`: for whoever has no checkout."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from typer.testing import CliRunner

import stamo_dist
from stamo_dist.cli.app import app
from stamo_dist.errors import StamoError
from stamo_dist.run import environment
from stamo_dist.run.registry import register

ROOT = Path(__file__).parents[2]


def test_env_says_versions_and_neither_who_nor_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_PASSPHRASE", "s3cret")
    for options in ((), ("--json",)):
        said = CliRunner().invoke(app, ["env", *options]).output
        assert "NCCL_PASSPHRASE" in said
        for private in ("s3cret", str(Path.home()), str(ROOT), sys.prefix, socket.gethostname()):
            assert private not in said
        if (user := getpass.getuser()) != "root":
            assert user not in said
    found = json.loads(said)
    assert found["stamo-dist"] == stamo_dist.__version__
    assert {"torch", "deepspeed", "python", "system", "GPUs", "CUDA of torch", "Slurm", "commit", "code"} <= set(found)


class _Driver:
    """libcuda and libcudnn of a machine with two GPUs."""

    def __init__(self) -> None:
        self.cudnnGetVersion = MagicMock(return_value=90100)

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return flags

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = 10 + number
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = f"GPU {device.value}, {size}".encode()
        return 0


def test_env_asks_the_driver_for_gpus_and_imports_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert environment.cuda_of_torch() == torch.version.cuda
    monkeypatch.setattr(environment, "cuda_of_torch", lambda: "12.8")
    monkeypatch.setattr(environment, "_library", lambda name: None)
    assert environment.described()["GPUs"] == []
    monkeypatch.setattr(environment, "_library", lambda name: _Driver())
    monkeypatch.setattr(environment, "versions", dict.fromkeys)
    found = environment.described()
    assert (found["GPUs"], found["cuDNN"]) == (["GPU 10, 256", "GPU 11, 256"], "90100")
    monkeypatch.setattr(environment, "versions", lambda names: dict.fromkeys(names, "9.1.0.70"))
    assert environment.described()["cuDNN"] == "9.1.0.70"
    program = "import sys; from stamo_dist.run.environment import described; described(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash: install bash")
def test_bash_completes_commands_options_recipes_fields_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("first_run", "second_run", "first_gone"):
        (tmp_path / name).mkdir()
        register(tmp_path / name)
    (tmp_path / "first_gone").rmdir()
    (tmp_path / "stamo").write_text(f'#!/bin/sh\nexec {sys.executable} -m stamo_dist.cli "$@"\n')
    (tmp_path / "stamo").chmod(0o755)
    script = (
        f'PATH={tmp_path}:$PATH; cd {ROOT}; eval "$(stamo completion bash)"\n'
        'try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _stamo_completion stamo; echo "${COMPREPLY[@]}"; }\n'
        "try stamo tra; try stamo data con; try stamo train --np; try stamo train tokenizer_sim_dr; try stamo nothing\n"
        "try stamo train x --set data.shuffle.o; try stamo recipe explain train.log\n"
        "try stamo recipe explain data.sou; try stamo eval rollout sec\n"
        "try stamo status fi; try stamo eval probe sec; try stamo report first_run f\n"
    )
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=True)
    said = [
        "train",
        "convert",
        "--nproc",
        "tokenizer_sim_droid tokenizer_sim_droid_oxe tokenizer_sim_droid_oxe_ego",
        "",
        "data.shuffle.order=",
        "train.log_every train.log_samples",
        "data.sources",
        "second_run",
        "first_run",
        "second_run",
        "first_run",
    ]
    assert done.stdout.splitlines() == said, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script_and_others_are_refused(shell: str) -> None:
    assert "_STAMO_COMPLETE" in CliRunner().invoke(app, ["completion", shell]).output
    refused = CliRunner().invoke(app, ["completion", f"{shell}x"])
    assert refused.exit_code == 2
    assert "there is completion for bash, zsh, fish" in refused.output


def test_init_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["init", "."]).exit_code == 0
    ignored = Path(".gitignore").read_text().splitlines()
    assert {"raw/", "shards/", "runs/"} <= set(ignored)
    for name in ("README.md", "recipes/vae.yaml", "slurm/gpu.yaml", "recipes/schema.json"):
        assert Path(name).is_file()
    Path("README.md").write_text("mine")
    shutil.rmtree("recipes")
    again = CliRunner().invoke(app, ["init", "."])
    assert again.exit_code == 0
    assert "left as they were: README.md, .gitignore, slurm/apptainer.yaml, slurm/gpu.yaml" in again.output
    assert "STAMO.md has five commands" in again.output
    assert Path("README.md").read_text() == "mine"
    assert Path("STAMO.md").read_text() != "mine"
    assert Path("recipes/vae.yaml").is_file()
    refused = CliRunner().invoke(app, ["init", "."])
    assert isinstance(refused.exception, StamoError)
    assert "is a project already" in str(refused.exception)


def test_the_demo_says_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = CliRunner().invoke(app, ["demo", "--dry-run"]).output.splitlines()
    assert lines[9:11] == [
        "$ timeout --signal=KILL 90 stamo train tokenizer_demo --nproc 2",
        "$ stamo train tokenizer_demo --nproc 2",
    ]
    monkeypatch.setattr("stamo_dist.cli.project.DEMO", "recipe show nothing_of_this_name\n")
    stopped = CliRunner().invoke(app, ["demo"])
    assert isinstance(stopped.exception, StamoError)
    assert "`stamo recipe` ended with exit code 2; `stamo demo` goes on from there" in str(stopped.exception)


#: A rank, as the launcher leaves it: in a session of its own, and it saves and leaves when the launcher is killed.
RANK = """
import ctypes, os, signal, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
open("ready", "w").close()
time.sleep(60)
"""


def test_nothing_that_the_demo_killed_says_anything_afterwards(tmp_path: Path) -> None:
    launcher = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {RANK!r}], start_new_session=True)\n"
        "time.sleep(60)"
    )
    demo = (
        "import time\nfrom pathlib import Path\nfrom stamo_dist.cli import project\n"
        "project._KILLED_AFTER = 1.0\n"
        f"with project._Commands() as commands: commands.run_and_kill([{sys.executable!r}, '-c', {launcher!r}])\n"
        "assert Path('ready').exists()\nprint('$ stamo next', flush=True)\ntime.sleep(0.3)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", demo], cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines() == [
        "killed, as was meant; the same command goes on from its last checkpoint:",
        "$ stamo next",
    ]


def test_the_demo_kills_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stamo_dist.cli import project

    monkeypatch.setattr(project, "_KILLED_AFTER", 3.0)
    pids = tmp_path / "pids"
    sleeper = (
        "import subprocess, time\n"
        f"child = subprocess.Popen(['sleep', '60']); open({str(pids)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    with project._Commands() as commands:
        commands.run_and_kill([sys.executable, "-c", sleeper])
    status = Path(f"/proc/{pids.read_text()}/stat")
    end = time.monotonic() + 20
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.1)
