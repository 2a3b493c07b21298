"""Exports go to the Hub and come back by their id: the Hub's own client, and a server that answers as the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub import TOKEN, Hub, Repository, serving
from s3 import free_port
from toy_policy import make_policy_data, write_policy_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_data(tmp_path_factory.mktemp("push") / "data")


@pytest.fixture(scope="module")
def exported(data: Path, ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    recipe = write_policy_recipe(root / "toy.yaml", data, actions="regression")
    ranks(1, "train", recipe, "--set", "train.steps=1")
    ranks(1, "export", root / "run", root / "out")
    return root / "out"


def ran(environ: dict[str, str], *command: object) -> tuple[int, str]:
    env = {**environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": os.environ["XDG_STATE_HOME"]}
    done = subprocess.run(
        [sys.executable, *map(str, command)], check=False, capture_output=True, text=True, env=env, timeout=300
    )
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def push(environ: dict[str, str], *arguments: object) -> tuple[int, str]:
    return ran(environ, "-m", "stamo_dist.cli", "export", *arguments)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_policy_goes_to_the_hub_and_is_used_by_its_id(
    hub: Hub, exported: Path, data: Path, tmp_path: Path, ranks: Callable
) -> None:
    environ = hub.environ(tmp_path / "home")
    code, said = push(environ, exported.parent / "run", f"{tmp_path}/nested/../anew", "--push", "lab/policy")
    assert code == 0, said
    assert not (tmp_path / "nested").exists()
    assert f"uploaded {tmp_path / 'anew'} to lab/policy: {hub.url}/lab/policy/commit/" in said
    held = hub.models["lab/policy"].files
    assert {k: v for k, v in held.items() if k != ".gitattributes"} == content(tmp_path / "anew")
    assert hub.large, "weights go to the store of large files"

    code, said = push(environ, exported, "--push", "lab/policy")
    assert code == 2
    assert "--push lab/policy: exists and has files; give another name, or --update to replace them" in said
    held["old.txt"] = b"goes"
    code, said = push(environ, exported, "--push", "lab/policy", "--update")
    assert code == 0, said
    assert "old.txt" not in held

    hub.models["lab/tokenizer"] = Repository(content(data / "tokenizer"))
    reads = (
        "from stamo_dist.models.policies import load_policy\nfrom stamo_dist.models.tokenizer import Tokenizer\n"
        "print(load_policy('lab/policy').chunk, Tokenizer.from_pretrained('lab/tokenizer').trained.compressor.tokens)"
    )
    by_id = (
        "recipe",
        "check",
        exported.parent / "toy.yaml",
        "--set",
        "policy.tokenizer=lab/tokenizer",
        "--set",
        f"run_dir={tmp_path}/run",
    )
    code, said = ran(environ, "-m", "stamo_dist.cli", *by_id)
    assert code == 0, said
    assert "policy.tokenizer: lab/tokenizer is not in the hub's cache: `hf download lab/tokenizer" in said
    away = (data / "tokenizer").rename(data / "away")
    try:
        assert ran(environ, "-c", reads) == (0, "2 2\n")
    finally:
        away.rename(data / "tokenizer")
    measured = ("-m", "stamo_dist.cli", "eval", "actions", "lab/policy", "--shards", data / "shards/a")
    code, said = ran(environ, *measured, "--out", tmp_path / "measured")
    assert code == 0, said


def test_an_upload_that_is_ended_says_how_it_goes_on(hub: Hub, exported: Path, tmp_path: Path) -> None:
    arrived, over = threading.Event(), threading.Event()
    hub.stuck = lambda: (arrived.set(), over.wait(60))
    command = [sys.executable, "-m", "stamo_dist.cli", "export", str(exported), "--push", "lab/policy"]
    env = {**hub.environ(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert arrived.wait(60)
    process.terminate()
    said = process.communicate(timeout=30)[1]
    over.set()
    assert process.returncode == 143
    again = f"`stamo export {exported} --push lab/policy --update` goes on"
    assert said.splitlines()[-1] == f"ended by SIGTERM; {exported} is whole: {again}"


def test_what_goes_wrong_is_one_line_with_a_way_out(hub: Hub, exported: Path, tmp_path: Path) -> None:
    known = hub.environ(tmp_path / "home")
    dead = {**known, "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    for environ, name, why in (
        (
            hub.environ(tmp_path / "home", None),
            "lab/a",
            "there is no token of the Hub; run `hf auth login`, or set HF_",
        ),
        (hub.environ(tmp_path / "home", "hf_other"), "lab/a", "the Hub does not know the token (401); run `hf auth lo"),
        (dead, "lab/a", f"{dead['HF_ENDPOINT']} cannot be reached (ConnectionError); try again where there is network"),
        ({**known, "HF_HUB_OFFLINE": "1"}, "lab/a", "HF_HUB_OFFLINE is set; unset it where there is network"),
        (known, "policy", "give OWNER/NAME, as in"),
        (known, "öwner/name", "give OWNER/NAME, as in my-lab/policy-drawer, of a–z, A–Z"),
        (known, "lab/policy.git", "is no name of the Hub's: "),
    ):
        code, said = push(environ, exported, "--push", name)
        assert code == 2, said
        (line,) = said.strip().splitlines()
        assert f"--push {name}: {why}" in line
    hub.refuse = 403
    assert "the token may not write there (403)" in push(known, exported, "--push", "lab/a")[1]
    assert "is no exported folder; give OUT" in push(known, tmp_path, "--push", "lab/a")[1]
    assert not hub.models
