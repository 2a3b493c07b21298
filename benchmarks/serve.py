"""Latency of a served policy over HTTP, beside the same calls in Python.

    python benchmarks/serve.py RUN [--batch 1 --batch 8] [--calls 30] [--port 0]
    python benchmarks/serve.py recipes/policy_openvla_lora.yaml --set policy.weights=null --set policy.lora=null

Of a run, `stamo serve` answers. A recipe's policy has random weights, which cost the same, and no folder: this process
serves it in a thread, so client and server share Python's lock.
"""

from __future__ import annotations

import argparse
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import requests
import uvicorn
from _beside import beside, gpu
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stamo_dist.device import Device
from stamo_dist.evaluate.speed import random_policy
from stamo_dist.models.policies import AnyPolicy, load_policy
from stamo_dist.plan.roofline import BANDWIDTH
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import open_run
from stamo_dist.serve import Server
from stamo_dist.serve.command import configured

HEADERS = {"Content-Type": "application/json"}
_WARM = 3
_TEXT = "put the red block into the drawer"


@contextmanager
def served_run(run: Path, port: int, *options: str) -> Iterator[str]:
    """`stamo serve RUN`; gives its address."""
    command = [sys.executable, "-m", "stamo_dist.cli", "serve", str(run), "--port", str(port), *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        url = re.search(r"http://\S+:\d+", server.stdout.readline())
        if url is None:
            raise SystemExit("the server did not start")
        yield answering(url[0])
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def served_here(policy: AnyPolicy, port: int) -> Iterator[str]:
    """A thread of this process; gives its address."""
    listening = socket.create_server(("127.0.0.1", port))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(configured(Server(policy, "random weights")))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield answering("http://{}:{}".format(*listening.getsockname()[:2]))
    finally:
        server.should_exit = True
        thread.join(30)


def answering(url: str) -> str:
    """`url`, once somebody answers there."""
    while True:
        try:
            requests.get(f"{url}/health", timeout=60)
            return url
        except requests.ConnectionError:
            time.sleep(0.1)


def least_milliseconds(policy: AnyPolicy) -> float | None:
    """A token at a time, each of which reads all weights of the language model: an autoregressive policy's limit."""
    network = getattr(policy, "network", None)
    if not Device.current().is_gpu or network is None or getattr(network, "parallel", True):
        return None
    held = sum(p.numel() * p.element_size() for p in network.vla.language_model.parameters())
    tokens = policy.chunk * len(
        policy.statistics.range(next(iter(policy.statistics.sources)), "action", policy.cfg.bounds)
    )
    return float(1000 * tokens * held / (gpu().memory * BANDWIDTH))


def moment_of(policy: AnyPolicy, size: int) -> dict[str, Any]:
    """A request of one timestep."""
    cfg, key = policy.cfg, next(iter(policy.statistics.sources))
    frame = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    moment: dict[str, Any] = {"image": [frame] * cfg.views, "instruction": _TEXT, "unnorm_key": key}
    if cfg.proprio:
        moment["state"] = np.zeros(len(policy.statistics.range(key, "proprio", cfg.bounds)))
    return moment


def calls_of(
    policy: AnyPolicy, size: int, batch: int, session: requests.Session, url: str
) -> dict[str, Callable[[], None]]:
    """The same request in Python and over HTTP."""
    moment = moment_of(policy, size)
    frames, felt, key = moment["image"], moment.get("state"), moment["unnorm_key"]
    payload = moment if batch == 1 else {"observations": [moment] * batch}

    def direct() -> None:
        many = None if felt is None else np.stack([felt] * batch)
        policy.act_batch([frames] * batch, [_TEXT] * batch, unnorm_key=key, proprio=many)

    def served() -> None:
        answer = session.post(f"{url}/act", data=json_numpy.dumps(payload), headers=HEADERS, timeout=600)
        answer.raise_for_status()
        json_numpy.loads(answer.text)

    return {"direct": direct, "served": served}


def measure(policy: AnyPolicy, size: int, url: str, batches: list[int], count: int) -> Iterator[tuple[int, Any, Any]]:
    """Batch and milliseconds of each call, in Python and over HTTP, in turns."""
    session = requests.Session()
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("calls", total=len(batches) * (count + _WARM))
        for batch in batches:
            calls = calls_of(policy, size, batch, session, url)
            found: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(count + _WARM):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    found[name].append(1000 * (time.perf_counter() - start))
                bar.advance(task)
            yield batch, *(np.array(found[name][_WARM:]) for name in ("direct", "served"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN|RECIPE")
    parser.add_argument("--batch", type=int, action="append", help="moments a request; 1 and 8 when omitted")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="of a recipe")
    options = parser.parse_args()
    device = str(Device.current().torch_device)
    if options.run.suffix in (".yaml", ".yml"):
        recipe = load(options.run, options.set).recipe
        policy: AnyPolicy = random_policy(recipe, device)
        serving = served_here(policy, options.port)
    else:
        recipe = load(open_run(options.run).resolved).recipe
        policy, serving = load_policy(options.run, device=device), served_run(options.run, options.port)
    table = Table(title=f"{options.run}: milliseconds a call on {Device.current().name}, medians of {options.calls}")
    for column in (
        "moments a request",
        "in Python",
        "over HTTP",
        "over HTTP, 90 %",
        "HTTP adds",
        "moments/s over HTTP",
    ):
        table.add_column(column, justify="right")
    limit = least_milliseconds(policy)
    lines = []
    with serving as url:
        found = measure(policy, recipe.data.image_size, url, options.batch or [1, 8], options.calls)
        for batch, direct, served in found:
            table.add_row(
                str(batch), f"{np.median(direct):.1f}", f"{np.median(served):.1f}", f"{np.quantile(served, 0.9):.1f}",
                f"{np.median(served - direct):.1f}", f"{1000 * batch / np.median(served):.1f}",
            )  # fmt: skip
            lines.append((f"serve, {batch} a request", float(np.median(served)), limit, "ms"))
    Console().print(table)
    for line in lines:
        beside(*line, other="least")


if __name__ == "__main__":
    main()
