"""Latency of a served policy over HTTP, beside the same calls in Python.

python benchmarks/serve.py RUN [--batch 1 --batch 8] [--calls 30] [--port 0]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batch", type=int, action="append", help="moments a request; 1 and 8 when omitted")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    size = load(open_run(options.run).resolved).recipe.data.image_size
    policy = load_policy(options.run, device="cuda" if torch.cuda.is_available() else "cpu")
    cfg, key = policy.cfg, next(iter(policy.statistics.sources))
    frame = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    felt = np.zeros(len(policy.statistics.range(key, "proprio", cfg.bounds))) if cfg.proprio else None
    moment: dict[str, Any] = {"image": [frame] * cfg.views, "instruction": _TEXT, "unnorm_key": key}
    moment |= {} if felt is None else {"state": felt}
    command = [sys.executable, "-m", "stamo_dist.cli", "serve", str(options.run), "--port", str(options.port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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
    try:
        url = wait_for(server)
        session = requests.Session()
        with Progress(console=Console(stderr=True)) as bar:
            batches = options.batch or [1, 8]
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
    finally:
        server.terminate()
        server.wait(30)
    Console().print(table)


if __name__ == "__main__":
    main()
