"""Who acts in the rollouts of a policy: the policy, or random actions within its bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stamo_dist.evaluate.closed_loop import TaskTrial
from stamo_dist.evaluate.simulators import Observation
from stamo_dist.models.policies import AnyPolicy


class PolicyAgent:
    """A policy for `drive`; `sources` names the statistics that the actions of each task are scaled by."""

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
    """Chunks of actions drawn evenly between the bounds that the policy's own actions are scaled by."""

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
