"""Training a recipe undisturbed, then under faults, and comparing the runs."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from stamo_dist.chaos import reference, results
from stamo_dist.chaos.compare import IDENTICAL, NOT, UNFINISHED, Comparison, History, compare, spread
from stamo_dist.chaos.conversion import Conversion
from stamo_dist.chaos.faults import KINDS, WORKER, Deck, Fault, Kind
from stamo_dist.chaos.monitor import Monitor
from stamo_dist.chaos.results import Result
from stamo_dist.chaos.starts import Starter
from stamo_dist.chaos.trial import FaultSchedule, Outcome, Pace, Trial
from stamo_dist.errors import RunError
from stamo_dist.recipe.load import Loaded, load

_HANGS = 60.0  # ranks are stopped only if train.step_timeout (s) is at most this
_CONVERSIONS = 7  # one fault in this many hits a conversion


@dataclass(frozen=True)
class Plan:
    """The settings of `stamo chaos`.

    Attributes:
        recipe, overrides: The recipe to train.
        kills: Faults in all, divided evenly among the strategies.
        seed: Seed of the faults.
        strategies: Strategies to test.
        sizes: Numbers of processes. Trainings use the largest throughout, or all of them in turn.
        out: Working folder; results of earlier calls in it are kept.
        untouched: Undisturbed trainings per reference.
        convert: Also kill conversions.
        patience: Seconds without a change after which a run counts as hung.
    """

    recipe: Path
    overrides: Sequence[str]
    kills: int
    seed: int
    strategies: Sequence[str]
    sizes: Sequence[int]
    out: Path
    untouched: int
    convert: bool
    patience: float


class Training(Protocol):
    """One training, with faults or without; its course is in `outcome`, also after an exception."""

    outcome: Outcome

    def run(self) -> Outcome: ...


class Harness:
    """Args:
    plan: What to do.
    starter: Starts `stamo` commands.
    say: Called with a line for each event.

    Raises:
        RunError: `plan.out` holds results of another recipe.
    """

    where = ""  # behind the strategy's name in the results

    def __init__(self, plan: Plan, starter: Starter, say: Callable[[str], None]):
        self._plan, self._starter, self._say = plan, starter, say
        self._loaded = {name: self._load(name) for name in plan.strategies}
        self._claim()

    def run(self) -> None:
        """Run all trainings; adds a line to `results` for each as soon as it is compared."""
        plan = self._plan
        converting = max(1, plan.kills // _CONVERSIONS) if plan.convert and plan.kills > 1 else 0
        shares = _deal(plan.kills - converting, len(plan.strategies))
        for strategy, faults in zip(plan.strategies, shares, strict=True):
            if faults:
                self._strategy(strategy, faults)
        if converting:
            self._convert(converting)

    def _strategy(self, strategy: str, faults: int) -> None:
        sizes = self._plan.sizes
        for size in sizes:
            self._untouched(strategy, size)
        rng = random.Random(f"{self._plan.seed} {strategy}")
        recipe = self._loaded[strategy].recipe
        deck = Deck(rng, self._kinds(strategy))
        groups = [[max(sizes)], list(sizes)] if len(sizes) > 1 else [list(sizes)]
        for group, share in zip(groups, _deal(faults, len(groups)), strict=True):
            hangs = min(group) > 1 and recipe.train.step_timeout <= _HANGS
            left = deque(deck.deal(hangs=hangs) for _ in range(share))
            while left and self._train(strategy, group, left, rng):
                pass

    def _train(self, strategy: str, sizes: list[int], faults: deque[Fault], rng: random.Random) -> bool:
        """One training under faults until it ends; returns whether it passed."""
        folder = self._fresh(f"{self._label(strategy)}-{'-'.join(map(str, sizes))}")
        references = [run for size in sizes for run in self._references(strategy, size)]
        gap = 0.9 * self._loaded[strategy].recipe.train.steps / max(1, len(faults))
        trial = self._trial(strategy, folder, sizes, FaultSchedule(faults, rng, gap), self._pace(references))
        verdict = None
        try:
            if (outcome := trial.run()).finished:
                alike = self._alike(strategy, folder)
                verdict = compare(History.read(folder), [History.read(run) for run in alike])
        except BaseException:
            self._record(strategy, sizes, trial.outcome, None, 0.0)
            raise
        between = spread([History.read(run) for run in references]) if len(sizes) > 1 else 0.0
        self._record(strategy, sizes, outcome, verdict, between)
        good = verdict is not None and verdict.good and not outcome.problems
        if good:
            _keep_logs(folder)
        return good

    def _kinds(self, strategy: str) -> Sequence[Kind]:
        workers = self._loaded[strategy].recipe.data.workers > 0
        return [kind for kind in KINDS if workers or kind[0] != WORKER]

    def _label(self, strategy: str) -> str:
        return f"{strategy}{self.where.replace(' ', '-')}"

    def _trial(
        self, strategy: str, folder: Path, sizes: Sequence[int], schedule: FaultSchedule, pace: Pace
    ) -> Training:
        given = self._arguments(strategy, folder)
        patience, say = self._plan.patience, self._say
        return Trial(self._starter, given, folder, sizes, schedule, pace=pace, patience=patience, say=say)

    def _alike(self, strategy: str, run: Path) -> list[Path]:
        """Undisturbed trainings that compute each step on the same number of processes as `run`."""
        segments = reference.segments(Monitor(run, self._plan.patience).begun())
        if len(segments) == 1:
            return self._references(strategy, segments[0].processes)
        folders = [run.with_name(f"twin-{run.name}-{n}") for n in range(self._plan.untouched)]
        on = ", ".join(f"{segment.processes} to {segment.last or 'the end'}" for segment in segments)
        for folder in folders:
            self._say(f"{folder.name}: training without faults, on as many processes in each step: {on}")
            reference.train(self._starter, self._arguments(strategy, folder), folder, segments, self._plan.patience)
            _keep_logs(folder)
        return folders

    def _record(
        self, strategy: str, sizes: list[int], outcome: Outcome, verdict: Comparison | None, between: float
    ) -> None:
        problems = [*outcome.problems, *(verdict.why if verdict and not verdict.good else [])]
        if verdict and not verdict.good and not problems:
            problems = ["samples are lost or repeated"]
        outcome = replace(outcome, problems=problems)
        found = verdict or Comparison(0, 0, [], UNFINISHED)
        self._append(f"{strategy}{self.where}", ", ".join(map(str, sizes)), outcome, found, between)

    def _append(self, what: str, processes: str, went: Outcome, found: Comparison, between: float = 0.0) -> None:
        seed = self._plan.seed
        result = Result(
            what, processes, seed, went.starts, went.faults, went.redone, found.lost, found.repeated, found.losses
        )
        result.deviation, result.spread, result.between = found.deviation, found.spread, between
        result.problems = went.problems
        results.append(self._plan.out, result)

    def _convert(self, faults: int) -> None:
        folder = self._fresh("convert")
        folder.mkdir()
        rng = random.Random(f"{self._plan.seed} convert")
        conversion = Conversion(self._starter, folder, rng, patience=self._plan.patience, say=self._say)
        try:
            outcome = conversion.run(faults)
        finally:
            outcome = conversion.outcome
            same = NOT if outcome.problems else IDENTICAL if outcome.finished else UNFINISHED
            self._append("convert", "1", outcome, Comparison(0, 0, [], same))
        if outcome.finished:
            shutil.rmtree(folder)

    def _untouched(self, strategy: str, size: int) -> None:
        """Run the undisturbed trainings that do not exist yet.

        Raises:
            RunError: One of them failed.
        """
        for folder in self._references(strategy, size):
            if (folder / "whole").is_file():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            self._say(f"{folder.name}: training without faults")
            trial = self._trial(strategy, folder, [size], FaultSchedule(deque(), random.Random(0), 1), Pace(0, 0, 0))
            began = time.monotonic()
            outcome = trial.run()
            if not outcome.finished:
                raise RunError("the training does not end without any fault:\n" + "\n".join(outcome.problems))
            _keep_logs(folder)
            (folder / "whole").write_text(json.dumps(asdict(_measure(folder, time.monotonic() - began))))

    def _references(self, strategy: str, size: int) -> list[Path]:
        return [self._plan.out / f"untouched-{self._label(strategy)}-{size}-{n}" for n in range(self._plan.untouched)]

    def _pace(self, runs: Sequence[Path]) -> Pace:
        paces = [Pace(**json.loads((run / "whole").read_text())) for run in runs]
        return max(paces, key=lambda pace: pace.start)

    def _arguments(self, strategy: str, run: Path) -> list[str]:
        return ["train", str(self._plan.recipe), *(x for s in self._settings(strategy, run) for x in ("--set", s))]

    def _settings(self, strategy: str, run: Path) -> list[str]:
        return [*self._plan.overrides, *self._own(strategy), f"run_dir={run}"]

    def _own(self, strategy: str) -> list[str]:
        return [f"strategy.name={strategy}", "train.log_samples=true", "train.log_every=1", "tracking.wandb=off"]

    def _load(self, strategy: str) -> Loaded:
        for size in self._plan.sizes:
            loaded = load(self._plan.recipe, [*self._plan.overrides, *self._own(strategy)], world_size=size)
        return loaded

    def _fresh(self, name: str) -> Path:
        return next(p for n in range(1, 10_000) if not (p := self._plan.out / f"{name}-{n}").exists())

    def _claim(self) -> None:
        """Reserve the folder for this recipe."""
        resolved = next(iter(self._loaded.values())).resolved
        content = {k: v for k, v in resolved.items() if k not in ("strategy", "run_dir")}
        mine = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        mark = self._plan.out / "recipe.sha256"
        try:
            self._plan.out.mkdir(parents=True, exist_ok=True)
            if mark.exists() and mark.read_text() != mine:
                raise RunError(f"{self._plan.out}: holds results of another recipe; choose another --out")
            mark.write_text(mine)
        except OSError as e:
            raise RunError(f"{self._plan.out}: cannot be written ({e.strerror}); choose another --out") from e


def _deal(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _measure(run: Path, seconds: float) -> Pace:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saves = [line["save_seconds"] for line in lines if "save_seconds" in line]
    steps = [b["seconds"] - a["seconds"] for a, b in pairwise(lines)]
    step, save = statistics.median(steps or [0.0]), statistics.median(saves or [0.0])
    return Pace(start=max(0.0, seconds - lines[-1]["seconds"]), step=step, save=save)


def _keep_logs(run: Path) -> None:
    """Remove all but the compared files."""
    for name in ("checkpoints", "model"):
        shutil.rmtree(run / name, ignore_errors=True)
