"""Latency of a served policy over HTTP, beside the same calls in Python; and the throughput of robots at once.

python benchmarks/serve.py RUN [--batch 1 --batch 8] [--clients 1 --clients 4 --clients 16] [--calls 30]

Robots that ask at once are computed together; beside them, a server that computes one timestep at a time.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import requests
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stamo_dist.models.policies import load_policy
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import open_run
from stamo_dist.serve.limits import DEFAULT

_WARM = 3
_JSON = {"Content-Type": "application/json"}
_TEXT = "put the red block into the drawer"


def wait_for(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    url = re.search(r"http://\S+:\d+", server.stdout.readline())
    if url is None:
        raise SystemExit("the server did not start")
    while True:
        try:
            requests.get(f"{url[0]}/health", timeout=60)
            return url[0]
        except requests.ConnectionError:
            time.sleep(0.1)


def throughput(url: str, body: str, clients: int, calls: int) -> float:
    """Answers a second to `clients` that ask at once, each again when it is answered."""
    ready = threading.Barrier(clients + 1)

    def robot() -> None:
        session = requests.Session()
        session.post(f"{url}/act", data=body, headers=_JSON, timeout=600).raise_for_status()
        ready.wait()
        for _ in range(calls):
            session.post(f"{url}/act", data=body, headers=_JSON, timeout=600).raise_for_status()

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(robot) for _ in range(clients)]
        ready.wait()
        start = time.perf_counter()
        for one in asked:
            one.result()
        return clients * calls / (time.perf_counter() - start)


def together(run: Path, moment: dict[str, Any], clients: list[int], calls: int) -> Table:
    """Answers a second with and without batching, measured in turn."""
    table = Table(title=f"{run}: answers a second to robots at once, medians of 5")
    for column in ("robots", "one at a time", "batched", "gain"):
        table.add_column(column, justify="right")
    body = json_numpy.dumps(moment)
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(run, "--batch", str(most))) for most in (1, DEFAULT.batch)]
        for count in clients:
            found = [[throughput(url, body, count, max(1, calls // count)) for url in urls] for _ in range(5)]
            alone, batched = np.median(found, axis=0)
            table.add_row(str(count), f"{alone:.1f}", f"{batched:.1f}", f"{batched / alone:.2f}×")
    return table


@contextmanager
def serving(run: Path, *options: str) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    command = [sys.executable, "-m", "stamo_dist.cli", "serve", str(run), "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield wait_for(server)
    finally:
        server.terminate()
        server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch", type=int, action="append", help="moments a request; 1 and 8 when omitted")
    parser.add_argument("--clients", type=int, action="append", help="robots at once; 1, 4 and 16 when omitted")
    parser.add_argument("--calls", type=int, default=30)
    options = parser.parse_args()
    size = load(open_run(options.run).resolved).recipe.data.image_size
    policy = load_policy(options.run, device="cuda" if torch.cuda.is_available() else "cpu")
    cfg, key = policy.cfg, next(iter(policy.statistics.sources))
    frame = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    felt = np.zeros(len(policy.statistics.range(key, "proprio", cfg.bounds))) if cfg.proprio else None
    moment: dict[str, Any] = {"image": [frame] * cfg.views, "instruction": _TEXT, "unnorm_key": key}
    moment |= {} if felt is None else {"state": felt}
    batches = options.batch or [1, 8]
    table = Table(title=f"{options.run}: milliseconds a call on {policy.device}, medians of {options.calls}")
    for column in (
        "moments a request",
        "in Python",
        "over HTTP",
        "over HTTP, 90 %",
        "HTTP adds",
        "moments/s over HTTP",
    ):
        table.add_column(column, justify="right")
    with serving(options.run) as url, Progress(console=Console(stderr=True)) as bar:
        session = requests.Session()
        task = bar.add_task("calls", total=len(batches) * (options.calls + _WARM))
        for batch in batches:
            payload = moment if batch == 1 else {"observations": [moment] * batch}

            def direct(batch: int = batch) -> None:
                many = None if felt is None else np.stack([felt] * batch)
                policy.act_batch([[frame] * cfg.views] * batch, [_TEXT] * batch, unnorm_key=key, proprio=many)

            def served(payload: dict[str, Any] = payload) -> None:
                answer = session.post(f"{url}/act", data=json_numpy.dumps(payload), headers=_JSON, timeout=600)
                answer.raise_for_status()
                json_numpy.loads(answer.text)

            calls: dict[str, Callable[[], None]] = {"direct": direct, "served": served}
            found: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(options.calls + _WARM):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    found[name].append(1000 * (time.perf_counter() - start))
                bar.advance(task)
            ours, theirs = (np.array(found[name][_WARM:]) for name in ("direct", "served"))
            table.add_row(
                str(batch), f"{np.median(ours):.1f}", f"{np.median(theirs):.1f}", f"{np.quantile(theirs, 0.9):.1f}",
                f"{np.median(theirs - ours):.1f}", f"{1000 * batch / np.median(theirs):.1f}",
            )  # fmt: skip
    Console().print(table)
    Console().print(together(options.run, moment, options.clients or [1, 4, 16], 10 * options.calls))


if __name__ == "__main__":
    main()
