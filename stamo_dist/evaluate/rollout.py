"""Rollouts: how often a policy solves a benchmark's tasks in closed loop (STAMO §3)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from stamo_dist.errors import RunError
from stamo_dist.evaluate import curve, successes
from stamo_dist.evaluate.closed_loop import Agent, Simulation, TaskTrial, TrialFolder, TrialOutcome, run_missing
from stamo_dist.evaluate.measurement import Measurement, how_much
from stamo_dist.evaluate.options import RolloutOptions, split
from stamo_dist.evaluate.result import EvaluationResult, Figure, output_folder
from stamo_dist.evaluate.shown import PolicyView
from stamo_dist.evaluate.simulators import ACTIONS, Observation, Setting, SimulatorCatalogue, check_trials
from stamo_dist.evaluate.weights import SCRATCH, SavedPolicy, exported_at, open_policy
from stamo_dist.models.policies import AnyPolicy
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import RunFolder, open_run

#: LIBERO's suites → the paper's names, in its order.
SUITES = {
    "libero_spatial": "Spatial",
    "libero_object": "Object",
    "libero_goal": "Goal",
    "libero_10": "Long",
    "libero_90": "90",
}
RANDOM, EXPERT = "random actions", "the expert"
Outcomes = Mapping[TaskTrial, TrialOutcome]


class PolicyAgent:
    """A policy as an agent for `drive`; `sources`: task → name of the statistics that scale its actions."""

    def __init__(self, policy: AnyPolicy, sources: Mapping[str, str], act_steps: int | None):
        self.policy, self._sources, self._act_steps = policy, sources, act_steps
        self.told: dict[str, str] = {}  # task → an instruction in place of the benchmark's

    @property
    def said(self) -> str:
        return ", ".join(dict.fromkeys(self._sources.values()))

    @torch.no_grad()
    def act(self, seen: Sequence[Observation], trials: Sequence[TaskTrial], steps: Sequence[int]) -> list[NDArray[Any]]:
        chunks: list[NDArray[Any]] = [np.empty(0)] * len(seen)
        for source in dict.fromkeys(self._sources.values()):
            mine = [i for i, trial in enumerate(trials) if self._sources[trial.task] == source]
            if not mine:
                continue
            moments = [seen[i] for i in mine]
            images = [moment.images for moment in moments]
            texts = [self.told.get(trials[i].task, seen[i].instruction) for i in mine]
            felt = np.stack([moment.proprio for moment in moments]) if self.policy.cfg.proprio else None
            found = self.policy.act_batch(images, texts, unnorm_key=source, proprio=felt)
            for i, chunk in zip(mine, found, strict=True):
                chunks[i] = chunk[: self._act_steps]
        return chunks


class RandomAgent:
    """Chunks of actions drawn uniformly between the bounds that scale the policy's actions."""

    def __init__(self, policy: AnyPolicy, sources: Mapping[str, str]):
        self._chunk, self._sources = policy.chunk, sources
        found = {s: policy.statistics.range(s, "action", policy.cfg.bounds) for s in dict.fromkeys(sources.values())}
        self.ranges = {source: [r.low.tolist(), r.high.tolist()] for source, r in found.items()}

    def act(self, seen: Sequence[Observation], trials: Sequence[TaskTrial], steps: Sequence[int]) -> list[NDArray[Any]]:
        chunks = []
        for trial, step in zip(trials, steps, strict=True):
            rng = np.random.default_rng([*trial.task.encode(), trial.number, step])
            low, high = self.ranges[self._sources[trial.task]]
            chunks.append(rng.uniform(low, high, (self._chunk, len(low))))
        return chunks


@dataclass(frozen=True)
class RolloutArm:
    """One agent that is evaluated in all trials."""

    name: str
    agent: Agent | None  # None: the benchmark's expert acts
    setting: Setting
    store: TrialFolder


@dataclass(kw_only=True)
class PolicyRollout(RolloutOptions, Measurement):
    """Rollouts of a run's policy, or of any policy that `load_policy` opens."""

    name = "rollout"
    title = "Rollouts of the policy"
    about = (
        "Closed loop: the policy looks, acts, and looks again until the benchmark's own success check holds or the "
        "steps are used up. Trial n of a task begins in the benchmark's initial state number n. "
        f"{successes.INTERVAL}"
    )
    better: ClassVar = {"success": "higher"}

    benchmarks: SimulatorCatalogue

    def open(self) -> None:
        if self.actions is not None and self.actions not in ACTIONS:
            raise RunError(f"--actions {self.actions}: must be one of {', '.join(ACTIONS)}")
        use = self.use()
        saved = SavedPolicy(self.policy, self.checkpoint, self.out, self.name) if self.checkpoint is not None else None
        run = RunFolder(Path(self.policy))
        if is_run := run.resolved.is_file():
            if not saved:
                exported_at(run)
            use.check_ours(self.policy)
        view = PolicyView.to(saved.model if saved else self.policy, self.benchmarks, self, use.named)
        self._tasks = self.benchmarks.resolve(view.benchmark, split(self.tasks), view.setting)
        check_trials(self.benchmarks, view.benchmark, self.trials)
        self._todo = [TaskTrial(name, number) for number in range(self.trials) for name in self._tasks]
        self._mine = successes.my_share(self._todo, self.slice, self.num_slices)
        if not is_run and self.out is None:
            raise RunError(f"{self.policy}: is no run folder; say with --out where the results go")
        if saved:
            loaded, self.provenance = saved.open(self.device, self.tokenizer, use)
        else:
            loaded, self.provenance = open_policy(self.policy, self.device, self.tokenizer, use)
        self._prepare(view, loaded)
        self.folder = output_folder(run, self.name, self.out)
        self._stamp = saved.digest if saved else _stamp(Path(self.provenance.checkpoint))

    def _prepare(self, view: PolicyView, loaded: AnyPolicy) -> None:
        """Match the policy with the benchmark.

        Raises:
            StamoError: Its views, statistics or instructions do not fit.
        """
        self._view, self._policy = view, loaded
        self._setting = view.with_views(loaded.cfg.views, named=bool(self.cameras))
        self._sources = view.sources_of(self._tasks, loaded)
        self._agent = PolicyAgent(loaded, self._sources, self.act_steps)
        if self.shuffle_instructions:
            self._agent.told = self._shuffled()
        self.console.print(
            f"{view.said(self._setting, loaded.framing)}; {self.act_steps or loaded.chunk} of {loaded.chunk} actions "
            f"taken at a time ({self._setting.actions}), scaled as {self._agent.said} ({loaded.cfg.bounds})",
            soft_wrap=True,
        )

    def _shuffled(self) -> dict[str, str]:
        """Task → the instruction of the next task.

        Raises:
            RunError: There is only one instruction.
        """
        told = [self.benchmarks.instruction(self._view.benchmark, task) for task in self._tasks]
        if len(set(told)) < 2:
            raise RunError("--shuffle-instructions: these tasks have one instruction; name tasks that differ by theirs")
        return dict(zip(self._tasks, [*told[1:], told[0]], strict=True))

    def settings(self) -> dict[str, Any]:
        setting, policy = self._setting, self._policy
        return {
            "benchmark": self._view.benchmark,
            "trials": self.trials,
            "cameras": list(setting.cameras),
            "size": setting.size,
            "rendered": setting.rendered,
            "finely": setting.finely,
            "actions": setting.actions,
            "unnorm_key": self._agent.said,
            "act_steps": self.act_steps,
            "max_steps": self.max_steps,
            "framing": policy.framing.to_dict(),
            "chunk": policy.chunk,
            "bounds": policy.cfg.bounds,
            **({"shuffle_instructions": True} if self.shuffle_instructions else {}),
        }

    def _arms(self) -> list[RolloutArm]:
        """The policy, and the baselines if requested. More trials continue after fewer."""
        folder, setting = self.folder / "trials", self._setting
        identity = {**self.settings(), "policy": self._stamp, "weights": self.provenance.checkpoint}
        del identity["trials"]
        arms = [RolloutArm(self.provenance.recipe, self._agent, setting, TrialFolder(folder, identity))]
        if self.baselines:
            same = {key: identity[key] for key in ("benchmark", "max_steps")}
            random = RandomAgent(self._policy, self._sources)
            drawn = {**same, "agent": RANDOM, "actions": setting.actions, "ranges": random.ranges}
            blind = replace(setting, cameras=())
            arms.append(RolloutArm(RANDOM, random, blind, TrialFolder(folder, drawn)))
            expert = replace(setting, expert=True)
            arms.append(RolloutArm(EXPERT, None, expert, TrialFolder(folder, {**same, "agent": EXPERT})))
        return arms

    def results(self) -> Iterator[EvaluationResult]:
        """Yield one result, or none if trials of other slices are missing."""
        arms, benchmark = self._arms(), self._view.benchmark
        processes = self.processes or self.benchmarks.default_processes(benchmark)
        for arm in arms:
            what = f"{benchmark}: trials" + (f" of {arm.name}" if self.baselines else "")
            simulation = Simulation(self.benchmarks, benchmark, arm.setting, processes, self.max_steps)
            films = successes.Films(arm.store, self._mine, self.videos if arm.agent is self._agent else 0)
            run_missing(self.bar, what, simulation, lambda: arm.agent, self._mine, arm.store, films)  # noqa: B023
        found = {arm.name: arm.store.read(self._todo) for arm in arms}
        absent = sum(len(self._todo) - len(outcomes) for outcomes in found.values())
        if self.num_slices > 1 and absent:
            self.console.print(
                f"slice {self.slice} of {self.num_slices} is done; {absent} trials of others are missing"
            )
            return
        yield self._result(found, arms[0].store)

    def _suites(self) -> dict[str, list[str]]:
        """Suite → its tasks."""
        suites: dict[str, list[str]] = {}
        for task in self._tasks:
            suites.setdefault(task.partition("/")[0] if "/" in task else self._view.benchmark, []).append(task)
        return suites

    def _result(self, found: Mapping[str, Outcomes], store: TrialFolder) -> EvaluationResult:
        self._ours = next(iter(found.values()))
        several = len(found) > 1
        rows: list[dict[str, Any]] = []
        figures: list[Figure] = []
        for suite, tasks in self._suites().items():
            for label, of in [*((task.rpartition("/")[2], [task]) for task in tasks), ("all tasks", tasks)]:
                for arm, outcomes in found.items():
                    row = successes.row([o for trial, o in outcomes.items() if trial.task in of])
                    rows.append({"suite": suite, "task": label, **({"agent": arm} if several else {}), **row})
            for task in tasks:
                of_task = [o for trial, o in self._ours.items() if trial.task == task]
                figures += successes.side_by_side(of_task, store, self.folder, suite, self.videos)
        keys = {"suite": "suite", "task": "task", **({"agent": "driven by"} if several else {})}
        part = how_much(sum(map(len, found.values())), len(self._todo) * len(found), "trials")
        title, columns = self.title + self._told, {**keys, **successes.COLUMNS}
        return self.result(rows, title=title, columns=columns, by=list(keys), figures=figures, partial=part)

    @property
    def _told(self) -> str:
        return ", each task told the next one's instruction" if self.shuffle_instructions else ""

    def show(self, result: EvaluationResult) -> None:
        """Also prints the suites' table, which is written beside the result."""
        super().show(result)
        rates = {
            SUITES.get(suite, suite): successes.row([o for t, o in self._ours.items() if t.task in tasks])["success"]
            for suite, tasks in self._suites().items()
        }
        known = [rate for rate in rates.values() if rate is not None]
        line = {"policy": self.provenance.recipe, **rates, "mean": sum(known) / len(known) if known else None}
        summary = replace(
            result,
            name="rollout_suites",
            title=f"Success %, suite by suite{self._told}",
            columns={key: key for key in line},
            rows=[line],
            figures=[],
            by=["policy"],
            better=dict.fromkeys([*rates, "mean"], "higher"),
            about="Mean over the trials of each suite, and the mean over the suites, as in the paper's table.",
        )
        summary.write(self.folder)
        summary.show(self.console, self.folder)


def _stamp(folder: Path) -> Any:
    """An identifier of a policy's files that does not read gigabytes; a hub id identifies itself."""
    if not folder.is_dir():
        return str(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "rollout" not in path.parts)
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def roll_out(run_path: Path, step: int, benchmarks: SimulatorCatalogue, console: Console | None = None) -> None:
    """Roll the checkpoint of `step` out into RUN/eval/during/, and rewrite the table of all steps.

    Raises:
        RunError: The run's recipe asks for no rollouts.
        StamoError: Raised by `PolicyRollout`.
    """
    run = open_run(run_path)
    recipe = load(run.resolved).recipe
    wanted = recipe.evaluate.rollout
    if wanted is None:
        raise RunError(
            f"{run.path}: its recipe sets no evaluate.rollout, so its training rolls nothing out; "
            f"`stamo eval rollout {run.path} --tasks TASK` does it now"
        )
    out = curve.folder(run, step)
    for leftover in out.glob(f"{SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    same = {field.name for field in fields(RolloutOptions)} & type(wanted).model_fields.keys() - {"device"}
    PolicyRollout(
        str(run.path),
        checkpoint=str(step),
        benchmarks=benchmarks,
        out=out,
        device=wanted.device or ("cpu" if wanted.where == "process" else None),
        **{name: getattr(wanted, name) for name in same},
    ).evaluate(console)
    curve.write(run, recipe)
