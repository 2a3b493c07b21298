"""Generated requests to a served toy policy: how they are answered, and how the slowest compares with a legitimate one.

python benchmarks/serve_requests.py RUN [--requests 10000]

RUN: a policy's run folder that reads one view and two numbers of proprioception, as the toy policy of the tests. The
requests are those of tests/serve/generated.py. Exits with 1 if one is answered with a code of the 500s, or later than
twice the slowest legitimate request.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serve"), str(ROOT / "benchmarks")]

import json_numpy  # noqa: E402
import numpy as np  # noqa: E402
import requests  # noqa: E402
from generated import BODIES  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from rich.progress import Progress  # noqa: E402
from serve import HEADERS, served_run  # noqa: E402

from stamo_dist.serve.limits import DEFAULT  # noqa: E402


def legitimate() -> dict[str, dict[str, Any]]:
    """The greatest requests that are answered."""
    text, felt = "push " * (DEFAULT.text // 5), [0.0, 0.0]

    def one(side: int) -> dict[str, Any]:
        return {"image": np.zeros((side, side, 3), np.uint8), "instruction": text, "state": felt}

    pixels = DEFAULT.body * 0.7 / 3
    many = DEFAULT.observations
    return {
        "one image": one(int(pixels**0.5)),
        f"{many} observations": {"observations": [one(int((pixels / many) ** 0.5))] * many},
        f"{many} small observations": {"observations": [one(32)] * many},
    }


def timed(session: requests.Session, url: str, body: bytes | str) -> tuple[int, float]:
    start = time.perf_counter()
    answer = session.post(f"{url}/act", data=body, headers=HEADERS, timeout=600)
    return answer.status_code, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    codes: Counter[int] = Counter()
    took: list[float] = []
    again: list[float] = []
    with served_run(options.run, 0) as url, requests.Session() as session:
        slowest = 0.0
        for name, payload in legitimate().items():
            body = json_numpy.dumps(payload)
            answers = [timed(session, url, body) for _ in range(3)]
            if {code for code, _ in answers} != {200}:
                raise SystemExit(f"{name}: answered with {answers[0][0]}; give a run as the toy policy's")
            seconds = float(np.median([seconds for _, seconds in answers]))
            print(f"{name}, {len(body) >> 20} MiB: {1000 * seconds:.0f} ms")
            slowest = max(slowest, seconds)
        with Progress() as bar:
            task = bar.add_task("generated", total=options.requests)

            @settings(
                max_examples=options.requests, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(body=BODIES)
            def ask(body: bytes) -> None:
                code, seconds = timed(session, url, body)
                codes[code] += 1
                if seconds > slowest / 2:  # of the machine, or of the request?
                    again.append(seconds)
                    seconds = min(seconds, *(timed(session, url, body)[1] for _ in range(2)))
                took.append(seconds)
                bar.advance(task)

            ask()
    print(f"{len(took)} generated: " + ", ".join(f"{n} × {code}" for code, n in sorted(codes.items())))
    print(
        f"{len(again)} took over half as long as the slowest legitimate one and were asked thrice, the fastest counts"
    )
    median, worst = 1000 * np.median(took), max(took)
    print(f"median {median:.1f} ms, slowest {1000 * worst:.0f} ms, {worst / slowest:.2f} of the slowest legitimate one")
    raise SystemExit(any(code >= 500 for code in codes) or worst > 2 * slowest)


if __name__ == "__main__":
    main()
