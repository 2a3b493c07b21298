"""Planning: a head that read actions from motions drives a simulated robot from (now, goal image) (STAMO §2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch import Tensor

from stamo_dist.engine.runfolder import open_run
from stamo_dist.errors import DataError
from stamo_dist.evaluate import heads, successes
from stamo_dist.evaluate.closed_loop import Agent, Outcome, Trial, TrialFolder, drive
from stamo_dist.evaluate.common import Result, load_tokenizer, output_folder, progress, read_recipe
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
from stamo_dist.evaluate.held_out import Source, open_sources, spread
from stamo_dist.evaluate.simulators import Benchmarks, Observation, Setting

NAME = "plan"
NOBODY = "random actions"
AGENTS = (STATE, POOLED, PATCHES, PIXELS, RANDOM, NOBODY)
#: The simulators draw at this many times the frames' side, and the picture is averaged, as a camera does.
_FINER = 2
_COLUMNS = {"task": "task", "agent": "motion as", **successes.COLUMNS}
_ABOUT = (
    "An MLP head (the probe's) sees the difference between the goal image and the present one in one frozen "
    "representation and gives the next actions; the robot takes them and looks again. The head learned on the training "
    "episodes, from every frame to its episode's last. The goal image is the last moment of the scripted expert's own "
    "solution of the same initial state; success is the benchmark's own check. random actions: drawn from the training "
    "episodes. "
)


def plan(
    run_path: Path,
    benchmarks: Benchmarks,
    *,
    tasks: Sequence[str],
    benchmark: str | None = None,
    source: str | None = None,
    checkpoint: str | None = None,
    trials: int = 20,
    k: int = 4,
    agents: Sequence[str] = AGENTS,
    episodes: int = 256,
    epochs: int = 60,
    patch_dim: int = 4096,
    max_steps: int | None = None,
    processes: int | None = None,
    videos: int = 2,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> Result:
    """Drive the robot of a benchmark by the motions of a run's tokenizer and write RUN/eval/plan/.

    `tasks`: the benchmark's names. `benchmark`: the format of `source` when omitted. `source`: of the recipe; the head
    learns on it; the first of the benchmark when omitted. `k`: actions between two looks. `agents`: which of AGENTS.
    `max_steps`: instead of the benchmark's. `videos`: kept of each task and agent. Started again it goes on.

    Raises:
        StamoError: No such run, task or source, a simulator that is not installed, or a goal the expert does not reach.
    """
    console = console or Console()
    run = open_run(run_path)
    recipe = read_recipe(run)
    chosen = _choose(open_sources(recipe), source, benchmark, k)
    benchmark = chosen.train.manifest.source_format if benchmark is None else benchmark
    size = recipe.data.image_size
    setting = Setting(_FINER * size, (chosen.camera,), goals=True)
    names = benchmarks.resolve(benchmark, tasks, setting)
    _check_trials(benchmarks, benchmark, trials)
    tokenizer, provenance = load_tokenizer(run, recipe, checkpoint)
    folder = output_folder(run, NAME, out)
    sources = {s.name: s.train for s in open_sources(recipe)}
    represent = Representations(tokenizer, standardising_frames(sources), patch_dim=patch_dim)
    features = FeatureCache(run.evaluations / "features", represent)
    data = _Pairs(chosen, recipe.data.sources[chosen.name].split, features, episodes, k)
    settings: dict[str, Any] = {
        "benchmark": benchmark, "source": chosen.name, "trials": trials, "k": k, "episodes": episodes, "epochs": epochs,
        "max_steps": max_steps, "seed": seed, "tokenizer": represent.key["tokenizer"],
    }  # fmt: skip
    todo = [Trial(name, number) for name in names for number in range(trials)]
    rows, figures, count = [], [], 0
    with progress(console) as bar:
        found: dict[str, dict[Trial, Outcome]] = {}
        stores: dict[str, TrialFolder] = {}
        for name in agents:
            identity = {**settings, "agent": name, "features": represent.key, "camera": chosen.camera, "size": size}
            identity["data"] = chosen.train.manifest.checksums
            del identity["trials"]  # more trials go on where fewer stopped
            store = stores[name] = TrialFolder(folder / "trials", identity)
            there = store.read(todo)
            watched = bar.add_task(name, total=len(todo), completed=len(there))
            missing = [trial for trial in todo if trial not in there]
            if missing:
                agent = data.agent(represent, name, size, epochs=epochs, seed=seed)
                drive(
                    agent, benchmarks, benchmark, setting, missing, store, max_steps=max_steps,
                    processes=processes or benchmarks.default_processes(benchmark),
                    keep_video=lambda o: o.trial < videos, done=lambda o: bar.advance(watched),  # noqa: B023
                )  # fmt: skip
            found[name] = store.read(todo)
            count += len(found[name])
            rows = _rows(names, found)
            figures = [
                figure
                for agent_name, outcomes in found.items()
                for task in names
                for figure in successes.videos(
                    [o for t, o in outcomes.items() if t.task == task], stores[agent_name], folder, agent_name, videos
                )
            ]
            result = Result(
                NAME, "Goal-conditioned planning", _ABOUT + successes.INTERVAL, _COLUMNS, rows, settings, provenance,
                _notes(rows), figures, by=["task", "agent"], better={"success": "higher"},
                partial=successes.partial(count, len(agents) * len(todo)),
            )  # fmt: skip
            result.write(folder)
    result.show(console, folder)
    return result


def _choose(sources: Sequence[Source], name: str | None, benchmark: str | None, k: int) -> Source:
    fitting = [
        s for s in sources
        if (name is None or s.name == name)
        and (name is not None or benchmark is None or s.train.manifest.source_format == benchmark)
        and s.train.manifest.action_dim
    ]  # fmt: skip
    if not fitting:
        there = ", ".join(f"{s.name} ({s.train.manifest.source_format})" for s in sources)
        raise DataError(
            f"no source with actions of {name or benchmark or 'any benchmark'}; the recipe has {there}; choose with "
            "--source"
        )
    source = fitting[0]
    if not source.train.manifest.convention.startswith("end-effector delta"):
        raise DataError(
            f"data.sources.{source.name}: its actions are {source.train.manifest.convention!r}, the simulators take "
            "deltas; convert it with --action delta"
        )
    if sum(episode.length > k for episode in source.train.episodes) < 2:
        raise DataError(
            f"data.sources.{source.name}: fewer than 2 training episodes of {k + 1} frames; use a smaller --k"
        )
    return source


def _check_trials(benchmarks: Benchmarks, benchmark: str, trials: int) -> None:
    most = benchmarks.trials(benchmark)
    if most is not None and trials > most:
        raise DataError(f"--trials {trials}: {benchmark} has {most} initial states of each task")


class _Pairs:
    """From every frame of the training episodes to the last: motions, and the next k actions."""

    def __init__(self, source: Source, split: str, features: FeatureCache, episodes: int, k: int):
        self._source, self._split, self._features, self._k = source, split, features, k
        self._chosen = [e for e in spread(episodes, len(source.train)) if source.train.episodes[e].length > k]
        self.actions = [torch.as_tensor(source.train.actions(e)) for e in self._chosen]
        self._scale = heads.Scale.of(torch.cat(self.actions))

    def agent(self, represent: Representations, name: str, size: int, *, epochs: int, seed: int) -> Agent:
        """Raises RuntimeError for a name that is not one of AGENTS."""
        if name == NOBODY:
            return _Random(self.actions, self._k, seed)
        rows = [self._features.episode(self._source.train, self._split, e)[name] for e in self._chosen]
        inputs = torch.cat([r[-1] - r[: len(a) - self._k + 1] for r, a in zip(rows, self.actions, strict=True)])
        varies = self._scale.varies
        targets = torch.cat(
            [self._scale(a)[:, varies].unfold(0, self._k, 1).transpose(1, 2).flatten(1) for a in self.actions]
        )
        episode = torch.cat([torch.full((len(a) - self._k + 1,), i) for i, a in enumerate(self.actions)])
        head = heads.fit(heads.MLP, inputs, targets, episode, seed=seed, epochs=epochs)
        return _Head(represent, name, head, self._scale, self._k, size)


class _Head:
    """The head as an agent."""

    def __init__(self, represent: Representations, name: str, head: heads.Head, scale: heads.Scale, k: int, size: int):
        self._represent, self._name, self._head, self._scale, self._k = represent, name, head, scale, k
        self._size = size
        self._goals: dict[Trial, Tensor] = {}

    def act(self, seen: Sequence[Observation], trials: Sequence[Trial], steps: Sequence[int]) -> list[NDArray[Any]]:
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


class _Random:
    """Chunks of the training episodes' actions, drawn anew at each look."""

    def __init__(self, actions: Sequence[Tensor], k: int, seed: int):
        self._actions, self._k, self._seed = actions, k, seed

    def act(self, seen: Sequence[Observation], trials: Sequence[Trial], steps: Sequence[int]) -> list[NDArray[Any]]:
        found = []
        for trial, step in zip(trials, steps, strict=True):
            rng = np.random.default_rng([self._seed, *trial.task.encode(), trial.number, step])
            episode = self._actions[rng.integers(len(self._actions))]
            start = rng.integers(len(episode) - self._k + 1)
            found.append(episode[start : start + self._k].double().numpy())
        return found


def _shrink(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))


def _rows(names: Sequence[str], found: dict[str, dict[Trial, Outcome]]) -> list[dict[str, Any]]:
    rows = []
    for task in names:
        for agent, outcomes in found.items():
            of_task = [o for t, o in outcomes.items() if t.task == task]
            rows.append({"task": task, "agent": agent, **successes.row(of_task)})
    return rows


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    for task in dict.fromkeys(row["task"] for row in rows):
        rates = {row["agent"]: row["success"] for row in rows if row["task"] == task}
        ours = rates.get(STATE)
        others = {name: rate for name, rate in rates.items() if name != STATE and rate is not None}
        if ours is None or not others:
            continue
        best = max(others, key=lambda name: others[name])
        word = "ahead of" if ours > others[best] else "level with" if ours == others[best] else "behind"
        notes.append(f"{task}: {STATE} {ours:.0f} %, {word} {best} ({others[best]:.0f} %)")
    return notes
