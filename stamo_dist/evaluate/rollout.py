"""Rollouts: how often a policy solves a benchmark's tasks in closed loop (STAMO §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from stamo_dist.engine.runfolder import RunFolder, git_commit
from stamo_dist.errors import DataError, RunError
from stamo_dist.evaluate import successes
from stamo_dist.evaluate.actions import open_policy
from stamo_dist.evaluate.closed_loop import Outcome, Trial, TrialFolder, drive
from stamo_dist.evaluate.common import Provenance, Result, output_folder, progress, typed_command
from stamo_dist.evaluate.saved_policy import open_saved
from stamo_dist.evaluate.simulators import ACTIONS, Benchmarks, Observation, Setting
from stamo_dist.models.policies import AnyPolicy, load_policy
from stamo_dist.recipe.load import load

NAME = "rollout"
#: The paper's names of LIBERO's suites, in its order.
SUITES = {
    "libero_spatial": "Spatial", "libero_object": "Object", "libero_goal": "Goal", "libero_10": "Long",
    "libero_90": "90",
}  # fmt: skip
_COLUMNS = {"suite": "suite", "task": "task", **successes.COLUMNS}
_ABOUT = (
    "Closed loop: the policy looks, acts, and looks again until the benchmark's own success check holds or the steps "
    "are used up. Trial n of a task begins in the benchmark's initial state number n. "
)


def rollout(
    policy: str,
    benchmarks: Benchmarks,
    *,
    checkpoint: str | None = None,
    tasks: Sequence[str],
    benchmark: str = "libero",
    trials: int = 20,
    cameras: Sequence[str] = (),
    size: int = 256,
    actions: str = "delta",
    unnorm_key: str | None = None,
    act_steps: int | None = None,
    max_steps: int | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    processes: int | None = None,
    videos: int = 1,
    num_slices: int = 1,
    slice: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> Result | None:
    """Roll a policy out and write OUT (RUN/eval/rollout/ of a run); None where other slices' trials are missing.

    `policy`: a run folder, or what `load_policy` takes. `cameras`: as many as the policy's views; the
    benchmark's first when omitted. `actions`: one of ACTIONS. `unnorm_key`: may be omitted where the policy knows one
    source. `act_steps`: of a chunk. `videos`: of each task's successes, and of its failures. `checkpoint`: of a run, in
    place of its export: a step, `best`, or a path.

    Raises:
        StamoError: A policy, task, camera or option that is none, or a simulator that is not installed.
    """
    console = console or Console()
    if actions not in ACTIONS:
        raise RunError(f"--actions {actions}: must be one of {', '.join(ACTIONS)}")
    setting = Setting(size, tuple(cameras) or (benchmarks.default_camera(benchmark),), actions)
    names = benchmarks.resolve(benchmark, tasks, setting)
    most = benchmarks.trials(benchmark)
    if most is not None and trials > most:
        raise DataError(f"--trials {trials}: {benchmark} has {most} initial states of each task")
    todo = [Trial(name, number) for number in range(trials) for name in names]
    mine = successes.my_share(todo, slice, num_slices)
    run = RunFolder(Path(policy)) if (Path(policy) / "resolved.yaml").is_file() else None
    if run is None and out is None:
        raise RunError(f"{policy}: is no run folder; say with --out where the results go")
    weights = str(run.model) if run else policy
    stamp: Any = None
    if checkpoint is not None:
        folder = output_folder(run or RunFolder(Path(policy)), NAME, out)
        loaded, provenance, stamp = open_saved(run, checkpoint, folder, device, tokenizer)
        weights = provenance.checkpoint
    elif run:
        loaded, provenance = open_policy(run, load(run.resolved).recipe, device, tokenizer)
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded, provenance = load_policy(policy, device=device, tokenizer=tokenizer), _provenance(policy)
    if loaded.cfg.views != len(setting.cameras):
        raise RunError(f"--cameras: the policy looks at {loaded.cfg.views} views, give as many; these are {cameras}")
    agent = PolicyAgent(loaded, unnorm_key or _only_source(loaded), act_steps)
    folder = output_folder(run, NAME, out) if run else output_folder(RunFolder(Path(weights)), NAME, out)
    settings = {
        "benchmark": benchmark, "trials": trials, "cameras": list(setting.cameras), "size": size, "actions": actions,
        "unnorm_key": agent.source, "act_steps": act_steps, "max_steps": max_steps,
    }  # fmt: skip
    identity: dict[str, Any] = {**settings, "policy": stamp or _stamp(Path(weights)), "weights": weights}
    del identity["trials"]  # more trials go on where fewer stopped
    store = TrialFolder(folder / "trials", identity)
    missing = [trial for trial in mine if trial not in (there := store.read(mine))]
    with progress(console) as bar:
        watched = bar.add_task(f"{benchmark}: trials", total=len(mine), completed=len(there) if mine else 0)
        drive(
            agent, benchmarks, benchmark, setting, missing, store, max_steps=max_steps,
            processes=processes or benchmarks.default_processes(benchmark), done=lambda o: bar.advance(watched),
            keep_video=successes.Films(store, mine, videos),
        )  # fmt: skip
    found = store.read(todo)
    if num_slices > 1 and len(found) < len(todo):
        console.print(f"slice {slice} of {num_slices} is done; {len(todo) - len(found)} trials of others are missing")
        return None
    return _write(found, names, store, folder, settings, provenance, videos, len(todo), console)


class PolicyAgent:
    """A policy for `drive`; `source` names the statistics its actions are scaled by."""

    def __init__(self, policy: AnyPolicy, source: str, act_steps: int | None):
        self.policy, self.source, self._act_steps = policy, source, act_steps

    @torch.no_grad()
    def act(self, seen: Sequence[Observation], trials: Sequence[Trial], steps: Sequence[int]) -> list[NDArray[Any]]:
        proprio = np.stack([moment.proprio for moment in seen]) if self.policy.cfg.proprio else None
        chunks = self.policy.act_batch(
            [moment.images for moment in seen], [moment.instruction for moment in seen],
            unnorm_key=self.source, proprio=proprio,
        )  # fmt: skip
        return [chunk[: self._act_steps] for chunk in chunks]


def _only_source(policy: AnyPolicy) -> str:
    known = list(policy.statistics.sources)
    if len(known) != 1:
        raise RunError(f"--unnorm-key: the policy has statistics of {', '.join(known) or 'no source'}; choose one")
    return known[0]


def _stamp(folder: Path) -> Any:
    """What tells one policy's files from another's without reading gigabytes; a hub id is its own name."""
    if not folder.is_dir():
        return str(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "rollout" not in path.parts)
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _provenance(weights: str) -> Provenance:
    """Of weights that no run of ours is known for."""
    return Provenance(
        recipe=Path(weights).name, data_fingerprint=None, checkpoint=weights, step=0, ema=False, trained_commit=None,
        git_commit=git_commit(), seed=0, command=typed_command(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip


def _write(
    found: Mapping[Trial, Outcome], names: Sequence[str], store: TrialFolder, folder: Path, settings: dict[str, Any],
    provenance: Provenance, videos: int, wanted: int, console: Console,
) -> Result:  # fmt: skip
    by_suite: dict[str, list[str]] = {}
    for name in names:
        by_suite.setdefault(name.partition("/")[0] if "/" in name else settings["benchmark"], []).append(name)
    rows, rates, figures = [], dict[str, float | None](), []
    for suite, tasks in by_suite.items():
        for task in tasks:
            outcomes = [o for trial, o in found.items() if trial.task == task]
            rows.append({"suite": suite, "task": task.rpartition("/")[2], **successes.row(outcomes)})
            figures += successes.side_by_side(outcomes, store, folder, suite, videos)
        all_of_it = successes.row([o for trial, o in found.items() if trial.task in tasks])
        rows.append({"suite": suite, "task": "all tasks", **all_of_it})
        rates[SUITES.get(suite, suite)] = all_of_it["success"]
    result = Result(
        NAME, "Rollouts of the policy", _ABOUT + successes.INTERVAL, _COLUMNS, rows, settings, provenance, [], figures,
        by=["suite", "task"], better={"success": "higher"}, partial=successes.partial(len(found), wanted),
    )  # fmt: skip
    result.write(folder)
    result.show(console, folder)
    known = [rate for rate in rates.values() if rate is not None]
    line = {"policy": provenance.recipe, **rates, "mean": sum(known) / len(known) if known else None}
    summary = replace(
        result, name="rollout_suites", title="Success %, suite by suite", columns={key: key for key in line},
        rows=[line], figures=[], by=["policy"], better=dict.fromkeys([*rates, "mean"], "higher"),
        about="Mean over the trials of each suite, and the mean over the suites, as in the paper's table.",
    )  # fmt: skip
    summary.write(folder)
    summary.show(console, folder)
    return result
