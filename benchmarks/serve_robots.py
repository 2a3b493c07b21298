"""Answers a second of a served policy to robots that ask at once, with and without computing them together.

python benchmarks/serve_robots.py RUN [--clients 1 --clients 4 --clients 16] [--calls 300]

Each robot asks again when it is answered. Beside the server as it is, one that computes one timestep at a time
(`stamo serve --batch 1`), measured in turn.
"""

from __future__ import annotations

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import json_numpy
import numpy as np
import requests
from rich.console import Console
from rich.table import Table
from serve import HEADERS, moment_of, served_run

from stamo_dist.device import Device
from stamo_dist.models.policies import load_policy
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import open_run
from stamo_dist.serve.limits import DEFAULT

_TURNS = 5


def throughput(url: str, body: str, clients: int, calls: int) -> float:
    """Answers a second to `clients` robots that ask at once."""
    ready = threading.Barrier(clients + 1)

    def robot() -> None:
        session = requests.Session()
        session.post(f"{url}/act", data=body, headers=HEADERS, timeout=600).raise_for_status()
        ready.wait()
        for _ in range(calls):
            session.post(f"{url}/act", data=body, headers=HEADERS, timeout=600).raise_for_status()

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(robot) for _ in range(clients)]
        ready.wait()
        start = time.perf_counter()
        for one in asked:
            one.result()
        return clients * calls / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--clients", type=int, action="append", help="robots at once; 1, 4 and 16 when omitted")
    parser.add_argument("--calls", type=int, default=300, help="of all robots together, in each of five turns")
    options = parser.parse_args()
    size = load(open_run(options.run).resolved).recipe.data.image_size
    body = json_numpy.dumps(moment_of(load_policy(options.run, device="cpu"), size))
    table = Table(title=f"{options.run} on {Device.current().name}: answers a second, medians of {_TURNS}")
    for column in ("robots", "one at a time", "together", "gain"):
        table.add_column(column, justify="right")
    with ExitStack() as stack:
        urls = [stack.enter_context(served_run(options.run, 0, "--batch", str(most))) for most in (1, DEFAULT.batch)]
        for count in options.clients or [1, 4, 16]:
            calls = max(1, options.calls // count)
            found = [[throughput(url, body, count, calls) for url in urls] for _ in range(_TURNS)]
            alone, together = np.median(found, axis=0)
            table.add_row(str(count), f"{alone:.1f}", f"{together:.1f}", f"{together / alone:.2f}×")
    Console().print(table)


if __name__ == "__main__":
    main()
