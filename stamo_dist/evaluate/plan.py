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

from stamo_dist.errors import DataError
from stamo_dist.evaluate import heads, successes
from stamo_dist.evaluate.closed_loop import Agent, Outcome, Trial, TrialFolder, drive
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
from stamo_dist.evaluate.measurement import progress
from stamo_dist.evaluate.result import Result, output_folder
from stamo_dist.evaluate.simulators import Benchmarks, Observation, Setting
from stamo_dist.evaluate.weights import load_tokenizer, read_recipe
from stamo_dist.run.folder import open_run

NAME = "plan"
NOBODY = "random actions"
_ALL = "all tasks"
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
    source: str | Sequence[str] | None = None,
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

    `tasks`: the benchmark's names. `benchmark`: the format of the first `source` when omitted. `source`: one or more of
    the recipe's, on which the head learns; all of the benchmark when omitted. `k`: actions between two looks.
    `agents`: which of AGENTS. `max_steps`: instead of the benchmark's. `videos`: kept of each task and
    agent. Started again it goes on.

    Raises:
        StamoError: No such run, task or source, a simulator that is not installed, or a goal the expert does not reach.
    """
    console = console or Console()
    run = open_run(run_path)
    recipe = read_recipe(run)
    chosen = _choose(open_sources(recipe), [source] if isinstance(source, str) else source or [], benchmark, k)
    camera = chosen[0].camera
    benchmark = chosen[0].train.manifest.source_format if benchmark is None else benchmark
    size = recipe.data.image_size
    setting = Setting(_FINER * size, (camera,), goals=True)
    names = benchmarks.resolve(benchmark, tasks, setting)
    _check_trials(benchmarks, benchmark, trials)
    tokenizer, provenance = load_tokenizer(run, recipe, checkpoint)
    folder = output_folder(run, NAME, out)
    sources = {s.name: s.train for s in open_sources(recipe)}
    represent = Representations(tokenizer, standardising_frames(sources), patch_dim=patch_dim)
    features = FeatureCache(run.evaluations / "features", represent)
    data = _Pairs([(s, recipe.data.sources[s.name].split) for s in chosen], features, episodes, k)
    settings: dict[str, Any] = {
        "benchmark": benchmark, "source": ", ".join(s.name for s in chosen), "trials": trials, "k": k,
        "episodes": episodes, "epochs": epochs, "max_steps": max_steps, "seed": seed,
        "tokenizer": represent.key["tokenizer"],
    }  # fmt: skip
    checksums = [s.train.manifest.checksums for s in chosen]
    todo = [Trial(name, number) for name in names for number in range(trials)]
    rows, figures, count = [], [], 0
    with progress(console) as bar:
        found: dict[str, dict[Trial, Outcome]] = {}
        stores: dict[str, TrialFolder] = {}
        for name in agents:
            identity = {**settings, "agent": name, "features": represent.key, "camera": camera, "size": size}
            identity["data"] = checksums[0] if len(checksums) == 1 else checksums
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


def _choose(sources: Sequence[Source], names: Sequence[str], benchmark: str | None, k: int) -> list[Source]:
    """Those named, or all of the benchmark: of the first source with actions, when that is omitted, too."""
    acting = [s for s in sources if s.train.manifest.action_dim and (not names or s.name in names)]
    if not names:
        benchmark = benchmark or next((s.train.manifest.source_format for s in acting), None)
        acting = [s for s in acting if s.train.manifest.source_format == benchmark]
    missing = [name for name in names if name not in [s.name for s in acting]]
    if missing or not acting:
        there = ", ".join(f"{s.name} ({s.train.manifest.source_format})" for s in sources)
        raise DataError(
            f"no source with actions of {', '.join(missing) or benchmark or 'any benchmark'}; the recipe has {there}; "
            "choose with --source"
        )
    for source in acting:
        if not source.train.manifest.convention.startswith("end-effector delta"):
            raise DataError(
                f"data.sources.{source.name}: its actions are {source.train.manifest.convention!r}, the simulators "
                "take deltas; convert it with --action delta, or choose others with --source"
            )
        if sum(episode.length > k for episode in source.train.episodes) < 2:
            raise DataError(
                f"data.sources.{source.name}: fewer than 2 training episodes of {k + 1} frames; use a smaller --k"
            )
        for what, own, first in (
            ("actions", source.train.manifest.action_dim, acting[0].train.manifest.action_dim),
            ("camera", source.camera, acting[0].camera),
        ):
            if own != first:
                raise DataError(
                    f"data.sources.{source.name}: {what} {own}, but {acting[0].name} has {first}: one head cannot "
                    "learn on both; choose with --source"
                )
    return acting


def _check_trials(benchmarks: Benchmarks, benchmark: str, trials: int) -> None:
    most = benchmarks.trials(benchmark)
    if most is not None and trials > most:
        raise DataError(f"--trials {trials}: {benchmark} has {most} initial states of each task")


class _Pairs:
    """From every frame of the training episodes to the last: motions, and the next k actions.

    `sources` come with their training splits; `episodes` is the most of each.
    """

    def __init__(self, sources: Sequence[tuple[Source, str]], features: FeatureCache, episodes: int, k: int):
        self._features, self._k = features, k
        self._chosen = [
            (source.train, split, e)
            for source, split in sources
            for e in spread(episodes, len(source.train))
            if source.train.episodes[e].length > k
        ]
        self.actions = [torch.as_tensor(train.actions(e)) for train, _, e in self._chosen]
        self._scale = heads.Scale.of(torch.cat(self.actions))

    def agent(self, represent: Representations, name: str, size: int, *, epochs: int, seed: int) -> Agent:
        """Raises RuntimeError for a name that is not one of AGENTS."""
        if name == NOBODY:
            return _Random(self.actions, self._k, seed)
        rows = [self._features.episode(train, split, e)[name] for train, split, e in self._chosen]
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
