"""A toy policy behind the real server, in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy import make_source
from toy_policy import set_statistics, write_policy_recipe

uvicorn = pytest.importorskip("uvicorn", reason="needs the [serve] extra: pip install -e '.[serve]'")


@pytest.fixture(scope="session")
def export(toy_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a policy with random weights."""
    import torch

    import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
    from stamo_dist.data.mixture import Mixture
    from stamo_dist.recipe.load import load
    from stamo_dist.tasks import build_task

    def build(actions: str, *, views: int = 1, proprio: bool = False) -> Path:
        folder = tmp_path_factory.mktemp(actions)
        settings = [f"data.views={views}", f"policy.views={views}"]
        if views > 1:
            cameras = tuple(f"camera_{v}" for v in range(views))
            source = make_source(folder, "a", cameras=cameras, splits=("train",), shard_bytes=1 << 20)
            set_statistics(source)
            settings += [f"data.sources.a.path={source}", "data.sources.a.instruction=x", "data.sources.b.weight=0"]
        path = write_policy_recipe(folder / "toy.yaml", toy_policy, actions=actions, proprio=proprio)
        recipe = load(path, settings).recipe
        torch.manual_seed(0)
        task = build_task(recipe, Mixture(recipe.data, seed=0, global_batch=8))
        task.export(folder / "model", task.trained.state_dict(), [])
        return folder / "model"

    return build


@pytest.fixture(scope="session")
def regression(export: Callable[..., Path]) -> Path:
    """A policy of one view that reads proprioception (2,) and answers chunks (2, 3)."""
    return export("regression", proprio=True)


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[..., str]]:
    """Answer in a thread; gives the URL. Options are those of `Server`."""
    from stamo_dist.serve import Server
    from stamo_dist.serve.command import configured
    from stamo_dist.serve.limits import DEFAULT

    servers = []

    def start(policy, **options) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        config = configured(Server(policy, "toy", **options), options.get("limits", DEFAULT))
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"

    yield start
    for server, _ in servers:
        server.should_exit = True
    for _, thread in servers:
        thread.join()
