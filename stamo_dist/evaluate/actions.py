"""Errors of a policy's action chunks on held-out episodes, compared with predicting the mean action."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from rich.progress import TaskID

from stamo_dist.data.frames import Episodes
from stamo_dist.data.schema import Manifest
from stamo_dist.data.sources import DEFAULT_CACHE
from stamo_dist.errors import DataError, RunError
from stamo_dist.evaluate.held_out import Pick, manifest_with, pick_frames
from stamo_dist.evaluate.measurement import Measurement
from stamo_dist.evaluate.options import ActionsOptions, split
from stamo_dist.evaluate.result import EvaluationResult, output_folder
from stamo_dist.evaluate.shown import check_order
from stamo_dist.evaluate.simulators import ACTIONS
from stamo_dist.evaluate.weights import open_policy
from stamo_dist.models.openvla.framing import FramingPreset
from stamo_dist.models.policies import AnyPolicy
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder


@dataclass(frozen=True)
class LabelledSource:
    """The cameras of one labelled source's episodes."""

    name: str  # name of the statistics that scale its actions
    cameras: list[Episodes]
    instruction: str
    convention: str = "delta"  # format of the policy's actions: one of ACTIONS

    def taken(self, episode: int, ts: Sequence[int]) -> NDArray[np.float64]:
        """Recorded actions at frames `ts`, in the policy's format: (len(ts), A)."""
        camera = self.cameras[0]
        if self.convention == "delta":
            return camera.actions(episode, ts).astype(np.float64)
        found = camera.original_actions(episode, ts).astype(np.float64)
        gripper = camera.manifest.gripper
        if self.convention == "openvla" and gripper is not None:
            found[:, -1] = camera.actions(episode, ts)[:, gripper]
        return found


class ActionErrors(ActionsOptions, Measurement):
    """Action errors of a run on its recipe's data, or of any policy that `load_policy` opens on a converted source."""

    name = "actions"
    title = "Held-out action error"
    about = (
        "Chunks predicted at evenly spaced held-out frames against the actions that were taken, normalised as in "
        "training: the statistics' bounds are −1 and 1. Mean |error| over all numbers of all actions of a chunk that "
        "the episode still has; of the chunk's first and last action alone; and of the training data's mean action in "
        "their place."
    )
    columns: ClassVar = {
        "source": "source",
        "frames": "frames",
        "mae": "mean |error|",
        "rmse": "root mean square",
        "first": "first action",
        "last": "last action",
        "baseline": "mean action",
    }
    by = ("source",)
    better: ClassVar = {"mae": "lower", "rmse": "lower"}

    _policy: AnyPolicy
    _sources: list[LabelledSource]

    def open(self) -> None:
        run = RunFolder(Path(self.policy))
        is_run = run.resolved.is_file()
        if is_run:
            self._open_run(run)
        else:
            self._open_released(run)
        seen = "; ".join(f"{s.name}: {', '.join(camera.camera for camera in s.cameras)}" for s in self._sources)
        meant = "" if is_run else f" ({self._sources[0].convention})"
        self.console.print(
            f"{seen}; {self._policy.framing.said()}; {self._policy.chunk} actions at a time{meant}, scaled by "
            f"{self._policy.cfg.bounds}",
            soft_wrap=True,
        )
        self.folder = output_folder(run, self.name, self.out)

    def _open_run(self, run: RunFolder) -> None:
        use = self.use()
        use.check_ours(self.policy)
        given = ("shards", "cameras", "actions", "unnorm_key")
        if said := [f"--{name.replace('_', '-')}" for name in given if getattr(self, name)]:
            raise RunError(f"{', '.join(said)}: {self.policy} is a run, whose recipe says it; leave it out")
        self._policy, self.provenance = open_policy(self.policy, tokenizer=self.tokenizer, use=use)
        self._sources = _held_out(load(run.resolved).recipe, self._policy, self.split)

    def _open_released(self, folder: RunFolder) -> None:
        use = self.use()
        if self.shards is None:
            raise RunError(f"{self.policy}: is no run folder; say with --shards on which converted source it acts")
        if self.out is None:
            raise RunError(f"{self.policy}: is no run folder; say with --out where the results go")
        output_folder(folder, self.name, self.out)
        manifest = manifest_with(self.shards, self.split, DEFAULT_CACHE)
        self._policy, self.provenance = open_policy(self.policy, tokenizer=self.tokenizer, use=use)
        self._sources = [self._fit(manifest, self.shards, use.named)]

    def _fit(self, manifest: Manifest, path: str, preset: FramingPreset | None) -> LabelledSource:
        """Match cameras, action format and statistics of the shards with the policy's.

        Raises:
            RunError, DataError: The policy has other views or action dimensions, or no statistics for them.
        """
        policy = self._policy
        convention = self.actions or (preset.actions if preset else "delta")
        if convention not in ACTIONS:
            raise RunError(f"--actions {convention}: must be one of {', '.join(ACTIONS)}")
        if convention == "openvla" and manifest.gripper is None:
            raise DataError(
                f"--actions openvla: {path} does not say which of its numbers is the gripper, which is to be 1 open "
                "and 0 closed; convert it with --action delta (it keeps the original numbers too)"
            )
        name = policy.statistics.key(
            self.unnorm_key if self.unnorm_key is not None else _fitting(policy, manifest.name)
        )
        seen = policy.statistics.seen.get(name)
        of = seen.format if seen else preset.benchmark if preset else None
        if of not in (None, manifest.source_format) and self.unnorm_key is None:
            raise RunError(
                f"{path}: is {manifest.source_format}, and the policy is one of {of}; choose other --shards, or with "
                "--unnorm-key the source whose actions it is to take there"
            )
        theirs = seen.cameras if seen else preset.cameras if preset else ()
        theirs = theirs if of == manifest.source_format else ()
        cameras = _cameras(split(self.cameras or []), theirs, manifest, path, policy.cfg.views)
        width = len(policy.statistics.range(name, "action", policy.cfg.bounds).low)
        has, meant = manifest.original_action_dim, manifest.original_convention or "not kept"
        if convention == "delta":
            has, meant = manifest.action_dim, manifest.convention
        if has != width:
            raise DataError(
                f"--actions {convention}: the policy's actions of {name} have {width} numbers, those of {path} "
                f"{has or 'no'} ({meant})"
            )
        if policy.cfg.proprio:
            reads = len(policy.statistics.range(name, "proprio", policy.cfg.bounds))
            if manifest.proprio_dim != reads:
                raise DataError(
                    f"{path}: has {manifest.proprio_dim or 'no'} numbers of proprioception, and the policy reads "
                    f"{reads}"
                )
        return LabelledSource(name, [Episodes(path, self.split, camera) for camera in cameras], "", convention)

    def settings(self) -> dict[str, Any]:
        framing = self._policy.framing.to_dict()
        return {"frames": self.frames, "split": self.split, "chunk": self._policy.chunk, "framing": framing}

    def results(self) -> Iterator[EvaluationResult]:
        watched = self.bar.add_task("frames", total=self.frames * len(self._sources))
        rows = [self._measure(source, watched) for source in self._sources]
        self.bar.update(watched, completed=self.frames * len(self._sources))
        yield self.result(rows)

    def _measure(self, source: LabelledSource, watched: TaskID) -> dict[str, Any]:
        policy, first = self._policy, source.cameras[0]
        ranges = policy.statistics.range(source.name, "action", policy.cfg.bounds)
        known = policy.statistics.sources[source.name]["action"]
        if "mean" not in known:
            raise DataError(
                f"{policy.statistics.origin}: {source.name}.action has no mean, beside which errors are shown"
            )
        mean = ranges.normalise(np.asarray(known["mean"]))
        errors, wholes, baseline = [], [], []
        picks = pick_frames(first, self.frames)
        for start in range(0, len(picks), self.batch):
            part = picks[start : start + self.batch]
            for pick, chunk in zip(part, self._act(source, part), strict=True):
                stop = min(pick.t + policy.chunk, first.episodes[pick.episode].length)
                taken = source.taken(pick.episode, range(pick.t, stop))
                wanted, given = ranges.normalise(taken), chunk[: len(taken)]
                # Normalised, a constant dimension is 0 whatever is predicted: its error is in its own units.
                error = np.where(ranges.constant, given - taken, ranges.normalise(given) - wanted)
                errors.append(error)
                baseline.append(np.abs(wanted - mean))
                if len(wanted) == policy.chunk:
                    wholes.append(np.abs(error))
            self.bar.advance(watched, len(part))
        every = np.concatenate(errors)
        return {
            "source": source.name,
            "frames": len(picks),
            "mae": float(np.abs(every).mean()),
            "rmse": float(np.sqrt(np.square(every).mean())),
            "first": float(np.mean([np.abs(e[0]) for e in errors])),
            "last": float(np.stack(wholes).mean((0, 2))[-1]) if wholes else None,
            "baseline": float(np.concatenate(baseline).mean()),
        }

    def _act(self, source: LabelledSource, picks: Sequence[Pick]) -> NDArray[Any]:
        """The chunk predicted at each frame, (n, C, A)."""
        first = source.cameras[0]
        images = [[camera.frames(p.episode, [p.t])[0] for camera in source.cameras] for p in picks]
        texts = [first.episodes[p.episode].instruction_at(p.t) or source.instruction for p in picks]
        felt = None
        if self._policy.cfg.proprio:
            felt = np.concatenate([first.proprio(p.episode, [p.t]) for p in picks])
        return self._policy.act_batch(images, texts, unnorm_key=source.name, proprio=felt)


def _held_out(recipe: Recipe, policy: AnyPolicy, split: str) -> list[LabelledSource]:
    found, problems = [], []
    for name, source in recipe.data.used.items():
        if name not in policy.statistics.sources:
            continue  # a video
        try:
            path, cache = source.paths[0], recipe.data.cache
            cameras = (source.cameras or manifest_with(path, split, cache).cameras)[: policy.cfg.views]
            opened = [Episodes(path, split, camera, cache=cache) for camera in cameras]
            found.append(LabelledSource(name, opened, source.instruction or ""))
        except DataError as e:
            problems.append(f"data.sources.{name}: {e}")
    if problems:
        raise DataError("\n".join(problems))
    return found


def _cameras(named: Sequence[str], theirs: Sequence[str], manifest: Manifest, path: str, views: int) -> Sequence[str]:
    """As many cameras as the policy has views: those named, else those recorded in the policy, else all cameras."""
    there = manifest.cameras
    if len(there) < views:
        raise RunError(
            f"{path}: has {len(there)} camera{'s' * (len(there) > 1)}, and the policy looks at {views} views"
        )
    check_order(named, theirs, "it knows them as")
    cameras = named or (theirs if set(theirs) <= set(there) else ()) or (there if len(there) == views else ())
    if len(set(cameras)) != views or len(cameras) != views or not set(cameras) <= set(there):
        raise RunError(
            f"--cameras {','.join(cameras)}: {path} has {', '.join(there)}; name {views} of them, in the order of the "
            "policy's views"
        )
    return cameras


def _fitting(policy: AnyPolicy, name: str) -> str | None:
    """The statistics with the name of the shards, else the only ones."""
    return name if name in policy.statistics.sources or f"{name}_no_noops" in policy.statistics.sources else None
