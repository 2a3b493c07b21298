"""Rollouts: how often a policy solves a benchmark's tasks in closed loop (STAMO §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from stamo_dist.errors import DataError, RunError
from stamo_dist.evaluate import successes
from stamo_dist.evaluate.actions import exported_at, open_policy
from stamo_dist.evaluate.closed_loop import Agent, Outcome, Trial, TrialFolder, drive
from stamo_dist.evaluate.measurement import progress
from stamo_dist.evaluate.result import Provenance, Result, output_folder
from stamo_dist.evaluate.saved_policy import Saved
from stamo_dist.evaluate.shown import Shown
from stamo_dist.evaluate.simulators import ACTIONS, Benchmarks, Observation, Setting
from stamo_dist.models.openvla.framing import AS_RECORDED, Use
from stamo_dist.models.policies import AnyPolicy, load_policy
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import RunFolder

NAME = "rollout"
#: The paper's names of LIBERO's suites, in its order.
SUITES = {
    "libero_spatial": "Spatial", "libero_object": "Object", "libero_goal": "Goal", "libero_10": "Long",
    "libero_90": "90",
}  # fmt: skip
RANDOM, EXPERT = "random actions", "the expert"
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
    benchmark: str | None = None,
    trials: int = 20,
    cameras: Sequence[str] = (),
    size: int | None = None,
    actions: str | None = None,
    use: Use = AS_RECORDED,
    unnorm_key: str | None = None,
    act_steps: int | None = None,
    max_steps: int | None = None,
    tokenizer: str | None = None,
    device: str | None = None,
    processes: int | None = None,
    videos: int = 1,
    baselines: bool = False,
    shuffle_instructions: bool = False,
    num_slices: int = 1,
    slice: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> Result | None:
    """Roll a policy out and write OUT (RUN/eval/rollout/ of a run); None where other slices' trials are missing.

    `policy`: a run folder, or what `load_policy` takes. `benchmark`, `cameras` (as many as the policy's views), `size`
    and `unnorm_key`: those the policy was trained with when omitted; where its folder does not say, LIBERO, the
    benchmark's first camera, 256 px and the one source it knows. `actions`: one of ACTIONS, delta when omitted. `use`:
    what a policy of others leaves unsaid, such as how its frames are turned. `act_steps`: of a chunk.
    `videos`: of each task's successes, and of its failures. `checkpoint`: of a run, in place of its export: a step,
    `best`, or a path. `baselines`: random actions and the benchmark's expert in the same trials.
    `shuffle_instructions`: every task is told what the next one is, which a policy that reads them fails.

    Raises:
        StamoError: A policy, task, camera or option that is none, or a simulator that is not installed.
    """
    console = console or Console()
    if actions is not None and actions not in ACTIONS:
        raise RunError(f"--actions {actions}: must be one of {', '.join(ACTIONS)}")
    saved = Saved(policy, checkpoint, out, NAME) if checkpoint is not None else None
    run = RunFolder(Path(policy)) if (Path(policy) / "resolved.yaml").is_file() else None
    if run and not saved:
        exported_at(run, load(run.resolved).recipe)
    if run:
        use.check_ours(policy)
    folder_of = saved.model if saved else policy
    shown = Shown.to(folder_of, benchmarks, benchmark, cameras, size, actions, unnorm_key, use.named)
    benchmark, setting, actions = shown.benchmark, shown.setting, shown.setting.actions
    names = benchmarks.resolve(benchmark, tasks, setting)
    most = benchmarks.trials(benchmark)
    if most is not None and trials > most:
        raise DataError(f"--trials {trials}: {benchmark} has {most} initial states of each task")
    todo = [Trial(name, number) for number in range(trials) for name in names]
    mine = successes.my_share(todo, slice, num_slices)
    if run is None and out is None:
        raise RunError(f"{policy}: is no run folder; say with --out where the results go")
    weights = str(run.model) if run else policy
    if saved:
        loaded, provenance = saved.open(device, tokenizer, use)
        weights = provenance.checkpoint
    elif run:
        loaded, provenance = open_policy(run, load(run.resolved).recipe, device, tokenizer, use)
    else:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_policy(policy, use=use, device=device, tokenizer=tokenizer)
        provenance = Provenance.of_released(policy)
    setting = shown.with_views(loaded.cfg.views, named=bool(cameras))
    sources = shown.sources_of(names, loaded)
    agent = PolicyAgent(loaded, sources, act_steps)
    if shuffle_instructions:
        agent.told = _shuffled(benchmarks, benchmark, names)
    folder = output_folder(run, NAME, out) if run else output_folder(RunFolder(Path(weights)), NAME, out)
    settings = {
        "benchmark": benchmark, "trials": trials, "cameras": list(setting.cameras), "size": setting.size,
        "rendered": setting.rendered, "finely": setting.finely, "actions": actions,
        "unnorm_key": agent.said, "act_steps": act_steps, "max_steps": max_steps,
        "framing": loaded.framing.to_dict(), "chunk": loaded.chunk, "bounds": loaded.cfg.bounds,
        **({"shuffle_instructions": True} if shuffle_instructions else {}),
    }  # fmt: skip
    console.print(
        f"{shown.said(setting, loaded.framing)}; {act_steps or loaded.chunk} of {loaded.chunk} actions taken at a "
        f"time ({actions}), scaled as {agent.said} ({loaded.cfg.bounds})", soft_wrap=True,
    )  # fmt: skip
    stamp = saved.digest if saved else _stamp(Path(weights))
    identity: dict[str, Any] = {**settings, "policy": stamp, "weights": weights}
    del identity["trials"]  # more trials go on where fewer stopped
    arms = [Arm(provenance.recipe, agent, setting, TrialFolder(folder / "trials", identity))]
    if baselines:
        same = {key: settings[key] for key in ("benchmark", "max_steps")}
        random = RandomAgent(loaded, sources)
        store = TrialFolder(folder / "trials", {**same, "agent": RANDOM, "actions": actions, "ranges": random.ranges})
        arms.append(Arm(RANDOM, random, replace(setting, cameras=()), store))  # it does not look
        store = TrialFolder(folder / "trials", {**same, "agent": EXPERT})
        arms.append(Arm(EXPERT, None, replace(setting, expert=True), store))
    with progress(console) as bar:
        for arm in arms:
            missing = [trial for trial in mine if trial not in (there := arm.store.read(mine))]
            what = f"{benchmark}: trials" + (f" of {arm.name}" if baselines else "")
            watched = bar.add_task(what, total=len(mine), completed=len(there) if mine else 0)
            drive(
                arm.agent, benchmarks, benchmark, arm.setting, missing, arm.store, max_steps=max_steps,
                processes=processes or benchmarks.default_processes(benchmark),
                done=lambda o: bar.advance(watched),  # noqa: B023
                keep_video=successes.Films(arm.store, mine, videos if arm.agent is agent else 0),
            )  # fmt: skip
    found = {arm.name: arm.store.read(todo) for arm in arms}
    if num_slices > 1 and (absent := sum(len(todo) - len(outcomes) for outcomes in found.values())):
        console.print(f"slice {slice} of {num_slices} is done; {absent} trials of others are missing")
        return None
    return _write(found, names, arms[0].store, folder, settings, provenance, videos, len(todo), console)


@dataclass(frozen=True)
class Arm:
    """One who drives the robot through all the trials."""

    name: str
    agent: Agent | None  # None: the expert of `setting`
    setting: Setting
    store: TrialFolder


def _shuffled(benchmarks: Benchmarks, benchmark: str, tasks: Sequence[str]) -> dict[str, str]:
    """Task → the instruction of the next task.

    Raises:
        RunError: There is only one instruction.
    """
    told = [benchmarks.instruction(benchmark, task) for task in tasks]
    if len(set(told)) < 2:
        raise RunError("--shuffle-instructions: these tasks have one instruction; name tasks that differ by theirs")
    return dict(zip(tasks, [*told[1:], told[0]], strict=True))


class PolicyAgent:
    """A policy for `drive`; `sources` names the statistics that the actions of each task are scaled by."""

    def __init__(self, policy: AnyPolicy, sources: Mapping[str, str], act_steps: int | None):
        self.policy, self._sources, self._act_steps = policy, sources, act_steps
        self.told: dict[str, str] = {}  # task → an instruction in place of the benchmark's

    @property
    def said(self) -> str:
        return ", ".join(dict.fromkeys(self._sources.values()))

    @torch.no_grad()
    def act(self, seen: Sequence[Observation], trials: Sequence[Trial], steps: Sequence[int]) -> list[NDArray[Any]]:
        chunks: list[NDArray[Any]] = [np.empty(0)] * len(seen)
        for source in dict.fromkeys(self._sources.values()):
            mine = [i for i, trial in enumerate(trials) if self._sources[trial.task] == source]
            if not mine:
                continue
            moments = [seen[i] for i in mine]
            found = self.policy.act_batch(
                [moment.images for moment in moments],
                [self.told.get(trials[i].task, seen[i].instruction) for i in mine], unnorm_key=source,
                proprio=np.stack([moment.proprio for moment in moments]) if self.policy.cfg.proprio else None,
            )  # fmt: skip
            for i, chunk in zip(mine, found, strict=True):
                chunks[i] = chunk[: self._act_steps]
        return chunks


class RandomAgent:
    """Chunks of actions drawn evenly between the bounds that the policy's own actions are scaled by."""

    def __init__(self, policy: AnyPolicy, sources: Mapping[str, str]):
        self._chunk, self._sources = policy.chunk, sources
        found = {s: policy.statistics.range(s, "action", policy.cfg.bounds) for s in dict.fromkeys(sources.values())}
        self.ranges = {source: [r.low.tolist(), r.high.tolist()] for source, r in found.items()}

    def act(self, seen: Sequence[Observation], trials: Sequence[Trial], steps: Sequence[int]) -> list[NDArray[Any]]:
        chunks = []
        for trial, step in zip(trials, steps, strict=True):
            rng = np.random.default_rng([*trial.task.encode(), trial.number, step])
            low, high = self.ranges[self._sources[trial.task]]
            chunks.append(rng.uniform(low, high, (self._chunk, len(low))))
        return chunks


def _stamp(folder: Path) -> Any:
    """What tells one policy's files from another's without reading gigabytes; a hub id is its own name."""
    if not folder.is_dir():
        return str(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "rollout" not in path.parts)
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _write(
    found: Mapping[str, Mapping[Trial, Outcome]], names: Sequence[str], store: TrialFolder, folder: Path,
    settings: dict[str, Any], provenance: Provenance, videos: int, wanted: int, console: Console,
) -> Result:  # fmt: skip
    ours = next(iter(found))
    columns = {"suite": "suite", "task": "task", **({"agent": "driven by"} if len(found) > 1 else {})}
    by_suite: dict[str, list[str]] = {}
    for name in names:
        by_suite.setdefault(name.partition("/")[0] if "/" in name else settings["benchmark"], []).append(name)
    rows, rates, figures = [], dict[str, float | None](), []
    for suite, tasks in by_suite.items():
        for label, of in [*((task.rpartition("/")[2], [task]) for task in tasks), ("all tasks", tasks)]:
            for arm, outcomes in found.items():
                row = successes.row([o for trial, o in outcomes.items() if trial.task in of])
                rows.append({"suite": suite, "task": label, **({"agent": arm} if len(found) > 1 else {}), **row})
        for task in tasks:
            of_task = [o for trial, o in found[ours].items() if trial.task == task]
            figures += successes.side_by_side(of_task, store, folder, suite, videos)
        of_suite = [o for trial, o in found[ours].items() if trial.task in tasks]
        rates[SUITES.get(suite, suite)] = successes.row(of_suite)["success"]
    told = ", each task told the next one's instruction" if settings.get("shuffle_instructions") else ""
    result = Result(
        NAME, f"Rollouts of the policy{told}", _ABOUT + successes.INTERVAL, {**columns, **successes.COLUMNS}, rows,
        settings, provenance, [], figures, by=list(columns), better={"success": "higher"},
        partial=successes.partial(sum(map(len, found.values())), wanted * len(found)),
    )  # fmt: skip
    result.write(folder)
    result.show(console, folder)
    known = [rate for rate in rates.values() if rate is not None]
    line = {"policy": provenance.recipe, **rates, "mean": sum(known) / len(known) if known else None}
    summary = replace(
        result, name="rollout_suites", title=f"Success %, suite by suite{told}", columns={key: key for key in line},
        rows=[line], figures=[], by=["policy"], better=dict.fromkeys([*rates, "mean"], "higher"),
        about="Mean over the trials of each suite, and the mean over the suites, as in the paper's table.",
    )  # fmt: skip
    summary.write(folder)
    summary.show(console, folder)
    return result
