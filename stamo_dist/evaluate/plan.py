"""Planning: a head that predicts actions from motions drives a simulated robot from (now, goal image) (STAMO §2.5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stamo_dist.errors import DataError
from stamo_dist.evaluate import heads, successes
from stamo_dist.evaluate.closed_loop import Agent, Simulation, TaskTrial, TrialFolder, TrialOutcome, run_missing
from stamo_dist.evaluate.features import (
    PATCHES,
    PIXELS,
    POOLED,
    RANDOM,
    STATE,
    FeatureCache,
    Representations,
    standardising_frames,
)
from stamo_dist.evaluate.held_out import HeldOutSource, spread
from stamo_dist.evaluate.measurement import TokenizerMeasurement, how_much
from stamo_dist.evaluate.options import PlanOptions, split
from stamo_dist.evaluate.result import EvaluationResult, Figure
from stamo_dist.evaluate.simulators import Observation, Setting, SimulatorCatalogue, check_trials

NOBODY = "random actions"
_ALL = "all tasks"
AGENTS = (STATE, POOLED, PATCHES, PIXELS, RANDOM, NOBODY)
#: The simulators render at this multiple of the frames' side, and the image is averaged, as in a camera.
_FINER = 2
_EPISODES, _PATCH_DIM = 256, 4096  # as in the probe
Outcomes = Mapping[TaskTrial, TrialOutcome]


@dataclass(kw_only=True)
class GoalPlanning(PlanOptions, TokenizerMeasurement):
    """Trials of each task with a head for each of AGENTS; each agent's trials give a result."""

    name = "plan"
    title = "Goal-conditioned planning"
    about = (
        "An MLP head (the probe's) sees the difference between the goal image and the present one in one frozen "
        "representation and gives the next actions; the robot takes them and looks again. The head learned on the "
        "training episodes, from every frame to its episode's last. The goal image is the last moment of the scripted "
        "expert's own solution of the same initial state; success is the benchmark's own check. random actions: drawn "
        f"from the training episodes. {successes.INTERVAL}"
    )
    columns: ClassVar = {"task": "task", "agent": "motion as", **successes.COLUMNS}
    by = ("task", "agent")
    better: ClassVar = {"success": "higher"}

    benchmarks: SimulatorCatalogue

    def select(self) -> None:
        self._chosen = self._acting_sources()
        camera = self._chosen[0].camera
        self._benchmark = self.benchmark or self._chosen[0].train.manifest.source_format
        self._size = self.recipe.data.image_size
        self._setting = Setting(_FINER * self._size, (camera,), goals=True)
        self._tasks = self.benchmarks.resolve(self._benchmark, split(self.tasks), self._setting)
        check_trials(self.benchmarks, self._benchmark, self.trials)

    @cached_property
    def represent(self) -> Representations:
        frames = standardising_frames({name: source.train for name, source in self.sources.items()})
        return Representations(self.tokenizer, frames, patch_dim=_PATCH_DIM)

    def settings(self) -> dict[str, Any]:
        return {
            "benchmark": self._benchmark,
            "source": ", ".join(source.name for source in self._chosen),
            "trials": self.trials,
            "k": self.k,
            "episodes": _EPISODES,
            "epochs": self.epochs,
            "max_steps": self.max_steps,
            "seed": self.seed,
            "tokenizer": self.represent.key["tokenizer"],
        }

    def identity(self) -> dict[str, Any]:
        checksums = [source.train.manifest.checksums for source in self._chosen]
        found = {**self.settings(), "features": self.represent.key, "camera": self._chosen[0].camera}
        del found["trials"]  # more trials continue after fewer
        return {**found, "size": self._size, "data": checksums[0] if len(checksums) == 1 else checksums}

    def results(self) -> Iterator[EvaluationResult]:
        features = FeatureCache(self.run_folder.evaluations / "features", self.represent)
        data = _GoalPairs([(s, self.recipe.data.sources[s.name].split) for s in self._chosen], features, self.k)
        todo = [TaskTrial(name, number) for name in self._tasks for number in range(self.trials)]
        processes = self.processes or self.benchmarks.default_processes(self._benchmark)
        simulation = Simulation(self.benchmarks, self._benchmark, self._setting, processes, self.max_steps)
        found: dict[str, Outcomes] = {}
        figures: list[Figure] = []
        for name in AGENTS:
            store = TrialFolder(self.folder / "trials", {**self.identity(), "agent": name})
            agent = partial(data.agent, self.represent, name, self._size, epochs=self.epochs, seed=self.seed)
            run_missing(self.bar, name, simulation, agent, todo, store, lambda outcome: outcome.trial < self.videos)
            found[name] = store.read(todo)
            for task in self._tasks:
                of_task = [outcome for trial, outcome in found[name].items() if trial.task == task]
                figures += successes.videos(of_task, store, self.folder, name, self.videos)
            rows = _rows(self._tasks, found)
            part = how_much(sum(map(len, found.values())), len(AGENTS) * len(todo), "trials")
            yield self.result(rows, notes=_notes(rows), figures=figures, partial=part)

    def _acting_sources(self) -> list[HeldOutSource]:
        """The named sources, or all of the benchmark's; by default the benchmark of the first source with actions."""
        names, benchmark = split(self.source or []), self.benchmark
        acting = [s for s in self.sources.values() if s.train.manifest.action_dim and (not names or s.name in names)]
        if not names:
            benchmark = benchmark or next((s.train.manifest.source_format for s in acting), None)
            acting = [s for s in acting if s.train.manifest.source_format == benchmark]
        missing = [name for name in names if name not in [s.name for s in acting]]
        if missing or not acting:
            there = ", ".join(f"{s.name} ({s.train.manifest.source_format})" for s in self.sources.values())
            raise DataError(
                f"no source with actions of {', '.join(missing) or benchmark or 'any benchmark'}; the recipe has "
                f"{there}; choose with --source"
            )
        for source in acting:
            _check_source(source, acting[0], self.k)
        return acting


def _check_source(source: HeldOutSource, first: HeldOutSource, k: int) -> None:
    """Raises: DataError: A head cannot be trained on this source, or not on it and the first one together."""
    manifest = source.train.manifest
    if not manifest.convention.startswith("end-effector delta"):
        raise DataError(
            f"data.sources.{source.name}: its actions are {manifest.convention!r}, the simulators take deltas; convert "
            "it with --action delta, or choose others with --source"
        )
    if sum(episode.length > k for episode in source.train.episodes) < 2:
        raise DataError(
            f"data.sources.{source.name}: fewer than 2 training episodes of {k + 1} frames; use a smaller --k"
        )
    for what, own, theirs in (
        ("actions", manifest.action_dim, first.train.manifest.action_dim),
        ("camera", source.camera, first.camera),
    ):
        if own != theirs:
            raise DataError(
                f"data.sources.{source.name}: {what} {own}, but {first.name} has {theirs}: one head cannot learn on "
                "both; choose with --source"
            )


class _GoalPairs:
    """Pairs of every frame of the training episodes with the last: motions, and the next k actions.

    `sources` come with the names of their training splits.
    """

    def __init__(self, sources: Sequence[tuple[HeldOutSource, str]], features: FeatureCache, k: int):
        self._features, self._k = features, k
        self._chosen = [
            (source.train, split, e)
            for source, split in sources
            for e in spread(_EPISODES, len(source.train))
            if source.train.episodes[e].length > k
        ]
        self.actions = [torch.as_tensor(train.actions(e)) for train, _, e in self._chosen]
        self._scale = heads.Scale.of(torch.cat(self.actions))

    def agent(self, represent: Representations, name: str, size: int, *, epochs: int, seed: int) -> Agent:
        """Raises RuntimeError if the name is not one of AGENTS."""
        if name == NOBODY:
            return _EpisodeActions(self.actions, self._k, seed)
        rows = [self._features.episode(train, split, e)[name] for train, split, e in self._chosen]
        inputs = torch.cat([r[-1] - r[: len(a) - self._k + 1] for r, a in zip(rows, self.actions, strict=True)])
        varies = self._scale.varies
        targets = torch.cat(
            [self._scale(a)[:, varies].unfold(0, self._k, 1).transpose(1, 2).flatten(1) for a in self.actions]
        )
        episode = torch.cat([torch.full((len(a) - self._k + 1,), i) for i, a in enumerate(self.actions)])
        head = heads.fit(heads.MLP, inputs, targets, episode, seed=seed, epochs=epochs)
        return _HeadAgent(represent, name, head, self._scale, self._k, size)


class _HeadAgent:
    """The head as an agent."""

    def __init__(self, represent: Representations, name: str, head: heads.Head, scale: heads.Scale, k: int, size: int):
        self._represent, self._name, self._head, self._scale, self._k = represent, name, head, scale, k
        self._size = size
        self._goals: dict[TaskTrial, Tensor] = {}

    def act(self, seen: Sequence[Observation], trials: Sequence[TaskTrial], steps: Sequence[int]) -> list[NDArray[Any]]:
        pictures = [moment.images[0] for moment in seen]
        new = [trial for trial in trials if trial not in self._goals]
        goals = {trial: moment.goal for trial, moment in zip(trials, seen, strict=True)}
        pictures += [goal for trial in new if (goal := goals[trial]) is not None]
        frames = torch.from_numpy(np.stack([_shrink(picture, self._size) for picture in pictures]))
        rows = self._represent(frames)[self._name]
        self._goals |= dict(zip(new, rows[len(seen) :], strict=True))
        motions = torch.stack([self._goals[trial] for trial in trials]) - rows[: len(seen)]
        with torch.no_grad():
            standard = self._head(motions).unflatten(1, (self._k, -1))
        varies = self._scale.varies
        actions = self._scale.mean.expand(*standard.shape[:2], -1).clone()
        actions[..., varies] += standard * self._scale.std[varies]
        return list(actions.double().numpy())


class _EpisodeActions:
    """Random chunks of the training episodes' actions, drawn anew at each observation."""

    def __init__(self, actions: Sequence[Tensor], k: int, seed: int):
        self._actions, self._k, self._seed = actions, k, seed

    def act(self, seen: Sequence[Observation], trials: Sequence[TaskTrial], steps: Sequence[int]) -> list[NDArray[Any]]:
        found = []
        for trial, step in zip(trials, steps, strict=True):
            rng = np.random.default_rng([self._seed, *trial.task.encode(), trial.number, step])
            episode = self._actions[rng.integers(len(self._actions))]
            start = rng.integers(len(episode) - self._k + 1)
            found.append(episode[start : start + self._k].double().numpy())
        return found


def _shrink(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))


def _rows(names: Sequence[str], found: Mapping[str, Outcomes]) -> list[dict[str, Any]]:
    groups = {name: [name] for name in names} | ({_ALL: list(names)} if len(names) > 1 else {})
    return [
        {"task": task, "agent": agent, **successes.row([o for t, o in outcomes.items() if t.task in members])}
        for task, members in groups.items()
        for agent, outcomes in found.items()
    ]


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = {row["agent"]: row for row in rows if row["task"] == task and row["success"] is not None}
        ours, others = of_task.pop(STATE, None), of_task
        if ours is None or not others:
            continue
        best = others[max(others, key=lambda name: others[name]["success"])]
        by, low, high = successes.difference(ours, best)
        word = "ahead of" if by > 0 else "level with" if by == 0 else "behind"
        notes.append(
            f"{task}: {STATE} {ours['success']:.0f} %, {word} {best['agent']} ({best['success']:.0f} %); difference "
            f"{low:+.0f} to {high:+.0f} points (95 %, Newcombe)"
        )
    return notes
