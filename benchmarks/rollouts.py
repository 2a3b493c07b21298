"""Trials per minute of `stamo eval rollout`: all simulators at once, beside one after the other.

    python benchmarks/rollouts.py demo/runs/policy_metaworld --tasks drawer-open-v3,drawer-close-v3 --trials 8
    python benchmarks/rollouts.py RUN --tasks libero_spatial --trials 2 --processes 8 --device cuda

The same trials each time, by the same policy. The limit is what the simulators do without one: they are shown the first
actions again and again, and nobody waits for a network. A simulator's start is counted: users wait for it, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_tools.simulators.catalogue import InstalledBenchmarks
from stamo_dist.evaluate.closed_loop import Agent, Simulation, TaskTrial, TrialFolder, drive
from stamo_dist.evaluate.options import ShowOptions
from stamo_dist.evaluate.rollout import PolicyAgent
from stamo_dist.evaluate.shown import PolicyView
from stamo_dist.evaluate.weights import open_policy
from stamo_dist.run.folder import RunFolder


class Counted:
    """An agent, and how many moments it was asked about at once."""

    def __init__(self, agent: Agent):
        self._agent, self.asked, self.seconds = agent, list[int](), 0.0

    def act(self, seen: Any, trials: Any, steps: Any) -> list[Any]:
        began = time.perf_counter()
        found = self._agent.act(seen, trials, steps)
        self.asked.append(len(seen))
        self.seconds += time.perf_counter() - began
        return found


class Same:
    """The first answer of an agent, for ever."""

    def __init__(self, agent: Agent):
        self._agent, self._first = agent, None

    def act(self, seen: Any, trials: Any, steps: Any) -> list[Any]:
        if self._first is None:
            self._first = self._agent.act(seen[:1], trials[:1], steps[:1])[0]
        return [np.array(self._first)] * len(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tasks", required=True, help="separated by commas")
    parser.add_argument("--trials", type=int, default=8, help="of each task (%(default)s)")
    parser.add_argument("--processes", type=int, help="simulators at once; as `stamo eval rollout` when omitted")
    parser.add_argument("--max-steps", type=int, default=100, help="of a trial (%(default)s)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    benchmarks, run = InstalledBenchmarks(), RunFolder(options.run)
    policy, _ = open_policy(run.path, options.device)
    shown = PolicyView.to(str(run.path), benchmarks, ShowOptions())
    setting = shown.with_views(policy.cfg.views, named=False)
    names = benchmarks.resolve(shown.benchmark, options.tasks.split(","), setting)
    agent = PolicyAgent(policy, shown.sources_of(names, policy), None)
    many = options.processes or benchmarks.default_processes(shown.benchmark)
    trials = [TaskTrial(name, number) for name in names for number in range(options.trials)]
    rows = []
    for name, processes, driver in (
        ("one after the other", 1, agent), (f"{many} simulators", many, agent), ("without a policy", many, Same(agent)),
    ):  # fmt: skip
        counted = Counted(driver)
        with tempfile.TemporaryDirectory() as scratch:
            began = time.perf_counter()
            simulation = Simulation(benchmarks, shown.benchmark, setting, processes, options.max_steps)
            store = TrialFolder(Path(scratch), {"as": name})
            drive(simulation, counted, trials, store, keep_video=lambda outcome: False)
            rows.append((name, time.perf_counter() - began, counted))
    table = Table(
        title=f"{len(trials)} trials of {shown.benchmark}, at most {options.max_steps} steps each, {options.device}"
    )
    for column in ("", "trials/min", "× one after the other", "moments at once", "policy's share of the time"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds, counted in rows:
        table.add_row(
            name, f"{60 * len(trials) / seconds:.1f}", f"{rows[0][1] / seconds:.2f}", f"{np.mean(counted.asked):.2f}",
            f"{100 * counted.seconds / seconds:.0f} %",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
