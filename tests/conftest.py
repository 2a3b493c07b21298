"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # must precede torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What the tests start has a sixth less to do in large pages: most of it is starting.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

import numpy as np
import torch
from forked import Ranks
from warm import Warm

ROOT = Path(__file__).resolve().parent.parent


#: Folders and fixtures whose tests start several processes, a simulator or a scheduler: not for the daily loop.
SLOW_FOLDERS = ("slurm", "resume", "distributed", "journeys", "chaos")
SLOW_FIXTURES = {"ranks", "stamo", "warm", "toy_policy"}
#: What runs one test after the other, in one worker of pytest-xdist, the longest first: a cluster, and whatever trains
#: or measures on several processes, in two halves. Every other file is for whichever worker is free after them.
LANES = {
    "slurm": ("slurm",),
    "runs": ("resume", "chaos", "launch", "publish/test_export.py", "cli/test_encode_states.py"),
    "processes": (
        "distributed", "journeys", "training", "evaluate/test_background.py", "evaluate/test_during.py",
        "evaluate/test_workers.py", "tasks/test_diffusion_task.py",
    ),
}  # fmt: skip


def lane(file: str) -> str:
    """What of it runs in one worker, from the path of a test's file below the repository."""
    below = file.removeprefix("tests/")
    return next((name for name, parts in LANES.items() if below in parts or below.partition("/")[0] in parts), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return Lanes(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in SLOW_FOLDERS or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(LANES)}
        items.sort(key=lambda item: order.get(lane(item.path.relative_to(ROOT).as_posix()), len(order)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What is random in a test does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The runs of tests are none of the user's."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sample_data() -> Callable[[str], Path]:
    """Path of a sample of real data; tests/samples/README.md says what they are."""
    return lambda name: ROOT / "tests" / "samples" / name


#: Folders that all tests of a worker share → what lies in them.
_SHARED: dict[Path, set[Path]] = {}


@pytest.fixture(autouse=True)
def _what_is_shared_stays() -> Iterator[None]:
    """A test that writes beside what all share fails itself, and not those after it."""
    yield
    for root, made in _SHARED.items():
        now = set(root.rglob("*"))
        changed, _SHARED[root] = sorted(now ^ made), now
        assert not changed, f"shared by all tests, to be copied first: {', '.join(map(str, changed))}"


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two toy sources and a random VAE, made once: `.shards` holds the sources a and b, `.vae` the VAE."""
    from toy import make_source, make_vae

    root = tmp_path_factory.mktemp("toy")
    make_source(root / "shards", "a", episodes=5)
    make_source(root / "shards", "b", episodes=3)
    made = SimpleNamespace(shards=root / "shards", vae=make_vae(root / "vae"))
    _SHARED[root] = set(root.rglob("*"))
    return made


@pytest.fixture(scope="session")
def toy_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a toy policy is trained on, made once: shards/a, shards/b (video) and a tokenizer."""
    from toy_policy import make_policy_data

    root = make_policy_data(tmp_path_factory.mktemp("toy_policy"))
    _SHARED[root] = set(root.rglob("*"))
    return root


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Start `stamo` commands that import torch, without that import: `warm.start(...)` is a process that runs."""
    server = Warm(tmp_path_factory.mktemp("warm"), os.environ)
    yield server
    server.close()


@pytest.fixture(scope="session")
def stamo(warm: Warm) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the `stamo` command in a process of its own, as a user does; what imports torch is forked off `warm`."""
    return warm.stamo


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Run ranks of the `stamo` command, forked from one process: much faster than `stamo` for many short runs."""
    server = Ranks(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()
