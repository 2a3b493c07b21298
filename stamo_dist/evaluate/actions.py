"""How far a policy's chunks are from what was done in held-out episodes; beside it, what the mean action would give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from stamo_dist.data.frames import Episodes
from stamo_dist.data.schema import Manifest
from stamo_dist.data.sources import DEFAULT_CACHE, open_source
from stamo_dist.errors import CheckpointError, DataError, RunError
from stamo_dist.evaluate.held_out import SPLIT, pick_frames
from stamo_dist.evaluate.measurement import progress
from stamo_dist.evaluate.result import Provenance, Result, output_folder
from stamo_dist.evaluate.shown import check_order
from stamo_dist.evaluate.simulators import ACTIONS
from stamo_dist.models.openvla.framing import AS_RECORDED, Use
from stamo_dist.models.policies import AnyPolicy, load_policy
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder

NAME = "actions"
_COLUMNS = {
    "source": "source",
    "frames": "frames",
    "mae": "mean |error|",
    "rmse": "root mean square",
    "first": "first action",
    "last": "last action",
    "baseline": "mean action",
}
_ABOUT = (
    "Chunks predicted at evenly spaced held-out frames against the actions that were taken, normalised as in training: "
    "the statistics' bounds are −1 and 1. Mean |error| over all numbers of all actions of a chunk that the episode "
    "still has; of the chunk's first and last action alone; and of the training data's mean action in their place."
)


@dataclass(frozen=True)
class Watched:
    """The cameras of one labelled source's episodes."""

    name: str  # of the statistics that scale its actions
    cameras: list[Episodes]
    instruction: str
    convention: str = "delta"  # what the policy's numbers are: one of ACTIONS

    def taken(self, episode: int, ts: Sequence[int]) -> NDArray[np.float64]:
        """What was done at frames `ts`, in the policy's numbers: (len(ts), A)."""
        camera = self.cameras[0]
        if self.convention == "delta":
            return camera.actions(episode, ts).astype(np.float64)
        found = camera.original_actions(episode, ts).astype(np.float64)
        gripper = camera.manifest.gripper
        if self.convention == "openvla" and gripper is not None:
            found[:, -1] = camera.actions(episode, ts)[:, gripper]
        return found


def actions(
    policy: str, *, shards: str | None = None, split: str = SPLIT, cameras: Sequence[str] = (),
    convention: str | None = None, unnorm_key: str | None = None, use: Use = AS_RECORDED, tokenizer: str | None = None,
    frames: int = 256, batch: int = 16, out: Path | None = None, console: Console | None = None,
) -> Result:  # fmt: skip
    """Measure a policy and write OUT (RUN/eval/actions/ of a run).

    `policy`: a run folder, whose recipe says on which data, or what `load_policy` takes, on the `split` of `shards`
    (a converted source) as `cameras` saw it, in the order of its views. `convention`: one of ACTIONS, in which its
    numbers are; delta, or the preset's, when omitted. `frames`: most of each source. `batch`: moments at once.

    Raises:
        StamoError: No such policy, its run trains none or has not ended, a source has nothing held out, or a released
            policy and the shards do not fit.
    """
    console = console or Console()
    run = RunFolder(Path(policy)) if (Path(policy) / "resolved.yaml").is_file() else None
    if run is None and shards is None:
        raise RunError(f"{policy}: is no run folder; say with --shards on which converted source it acts")
    if run:
        use.check_ours(policy)
        given = {"shards": shards, "cameras": cameras, "actions": convention, "unnorm-key": unnorm_key}
        if said := [f"--{name}" for name, value in given.items() if value]:
            raise RunError(f"{', '.join(said)}: {policy} is a run, whose recipe says it; leave it out")
        recipe = load(run.resolved).recipe
        loaded, provenance = open_policy(run, recipe, tokenizer=tokenizer, use=use)
        watched = _open(recipe, loaded, split)
    else:
        if out is None:
            raise RunError(f"{policy}: is no run folder; say with --out where the results go")
        assert shards is not None
        output_folder(RunFolder(Path(policy)), NAME, out)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        manifest = _manifest(shards, split, DEFAULT_CACHE)
        loaded = load_policy(policy, use=use, device=device, tokenizer=tokenizer)
        provenance = Provenance.of_released(policy)
        watched = [_of_shards(loaded, manifest, shards, split, cameras, convention, unnorm_key, use)]
    seen = "; ".join(f"{source.name}: {', '.join(camera.camera for camera in source.cameras)}" for source in watched)
    meant = "".join(f" ({source.convention})" for source in watched[:1] if not run)
    console.print(
        f"{seen}; {loaded.framing.said()}; {loaded.chunk} actions at a time{meant}, scaled by {loaded.cfg.bounds}",
        soft_wrap=True,
    )
    folder = output_folder(run or RunFolder(Path(policy)), NAME, out)
    rows = []
    with progress(console) as bar:
        task = bar.add_task("frames", total=frames * len(watched))
        for source in watched:
            rows.append(_measure(loaded, source, frames, batch, lambda n: bar.advance(task, n)))
        bar.update(task, completed=frames * len(watched))
    result = Result(
        NAME, "Held-out action error", _ABOUT, _COLUMNS, rows,
        {"frames": frames, "split": split, "chunk": loaded.chunk, "framing": loaded.framing.to_dict()}, provenance,
        by=["source"], better={"mae": "lower", "rmse": "lower"},
    )  # fmt: skip
    result.write(folder)
    result.show(console, folder)
    return result


def exported_at(run: RunFolder, recipe: Recipe) -> int:
    """The step whose policy a run has exported.

    Raises:
        RunError: The run trains something else.
        CheckpointError: It has exported nothing yet.
    """
    if recipe.stage != "policy":
        raise RunError(f"{run.path}: its recipe trains the {recipe.stage} stage; give the run folder of a policy")
    if not run.exported.is_file():
        raise CheckpointError(f"{run.path}: nothing exported yet; train it to its end")
    return int(json.loads(run.exported.read_text())["step"])


def open_policy(
    run: RunFolder,
    recipe: Recipe,
    device: str | None = None,
    tokenizer: str | None = None,
    use: Use = AS_RECORDED,
) -> tuple[AnyPolicy, Provenance]:
    """The policy that a run exported, and where it comes from; `tokenizer` is where the one it sees through moved to.

    Raises:
        RunError: The run trains something else.
        CheckpointError: It has exported nothing yet.
    """
    step = exported_at(run, recipe)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = (
        {"tokenizer": tokenizer or recipe.policy.tokenizer} if recipe.policy.vision == "stamo" else {}
    )
    policy = load_policy(run.model, use=use, device=device, **options)
    return policy, Provenance.of_export(recipe, str(run.model), step)


def _manifest(path: str, split: str, cache: str) -> Manifest:
    manifest = open_source(path, cache).manifest
    if split not in manifest.splits or not manifest.splits[split].frames:
        there = ", ".join(name for name, found in manifest.splits.items() if found.frames) or "none"
        fix = "convert it anew with a --val-fraction above 0" if split == SPLIT else "choose another --split"
        raise DataError(f"{path} has no {split!r} split (its splits: {there}); {fix}")
    return manifest


def _open(recipe: Recipe, policy: AnyPolicy, split: str) -> list[Watched]:
    found, problems = [], []
    for name, source in recipe.data.used.items():
        if name not in policy.statistics.sources:
            continue  # a video
        try:
            path, cache = source.paths[0], recipe.data.cache
            cameras = (source.cameras or _manifest(path, split, cache).cameras)[: policy.cfg.views]
            opened = [Episodes(path, split, camera, cache=cache) for camera in cameras]
            found.append(Watched(name, opened, source.instruction or ""))
        except DataError as e:
            problems.append(f"data.sources.{name}: {e}")
    if problems:
        raise DataError("\n".join(problems))
    return found


def _of_shards(
    policy: AnyPolicy, manifest: Manifest, path: str, split: str, cameras: Sequence[str], convention: str | None,
    unnorm_key: str | None, use: Use,
) -> Watched:  # fmt: skip
    """Raises: RunError, DataError: The policy has other views, other numbers, or no statistics for them."""
    preset = use.named
    convention = convention or (preset.actions if preset else "delta")
    if convention not in ACTIONS:
        raise RunError(f"--actions {convention}: must be one of {', '.join(ACTIONS)}")
    if convention == "openvla" and manifest.gripper is None:
        raise DataError(
            f"--actions openvla: {path} does not say which of its numbers is the gripper, which is to be 1 open and 0 "
            "closed; convert it with --action delta (it keeps the original numbers too)"
        )
    name = policy.statistics.key(unnorm_key if unnorm_key is not None else _fitting(policy, manifest.name))
    seen = policy.statistics.seen.get(name)
    of = seen.format if seen else preset.benchmark if preset else None
    if of not in (None, manifest.source_format) and unnorm_key is None:
        raise RunError(
            f"{path}: is {manifest.source_format}, and the policy is one of {of}; choose other --shards, or with "
            "--unnorm-key the source whose actions it is to take there"
        )
    theirs = seen.cameras if seen else preset.cameras if preset else ()
    cameras = _cameras(cameras, theirs if of == manifest.source_format else (), manifest, path, policy.cfg.views)
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
                f"{path}: has {manifest.proprio_dim or 'no'} numbers of proprioception, and the policy reads {reads}"
            )
    return Watched(name, [Episodes(path, split, camera) for camera in cameras], "", convention)


def _cameras(named: Sequence[str], theirs: Sequence[str], manifest: Manifest, path: str, views: int) -> Sequence[str]:
    """As many as the policy has views: those named, else those it knows, else all that there are."""
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
    """The statistics that are called as the shards are, else the only ones."""
    return name if name in policy.statistics.sources or f"{name}_no_noops" in policy.statistics.sources else None


def _measure(policy: AnyPolicy, source: Watched, frames: int, batch: int, advance: Any) -> dict[str, Any]:
    first = source.cameras[0]
    ranges = policy.statistics.range(source.name, "action", policy.cfg.bounds)
    known = policy.statistics.sources[source.name]["action"]
    if "mean" not in known:
        raise DataError(f"{policy.statistics.origin}: {source.name}.action has no mean, beside which errors are shown")
    mean = ranges.normalise(np.asarray(known["mean"]))
    errors, wholes, baseline = [], [], []
    picks = pick_frames(first, frames)
    for start in range(0, len(picks), batch):
        part = picks[start : start + batch]
        images = [[camera.frames(p.episode, [p.t])[0] for camera in source.cameras] for p in part]
        texts = [first.episodes[p.episode].instruction_at(p.t) or source.instruction for p in part]
        felt = None
        if policy.cfg.proprio:
            felt = np.concatenate([first.proprio(p.episode, [p.t]) for p in part])
        chunks = policy.act_batch(images, texts, unnorm_key=source.name, proprio=felt)
        for pick, chunk in zip(part, chunks, strict=True):
            stop = min(pick.t + policy.chunk, first.episodes[pick.episode].length)
            taken = source.taken(pick.episode, range(pick.t, stop))
            wanted = ranges.normalise(taken)
            # Normalised, a constant is 0 whatever comes back for it: there the error is in its own units.
            error = np.where(
                ranges.constant, chunk[: len(taken)] - taken, ranges.normalise(chunk[: len(taken)]) - wanted
            )
            errors.append(error)
            baseline.append(np.abs(wanted - mean))
            if len(wanted) == policy.chunk:
                wholes.append(np.abs(error))
        advance(len(part))
    every = np.concatenate(errors)
    whole: Sequence[float] = np.stack(wholes).mean((0, 2)) if wholes else [float("nan")]
    return {
        "source": source.name, "frames": len(picks), "mae": float(np.abs(every).mean()),
        "rmse": float(np.sqrt(np.square(every).mean())), "first": float(np.mean([np.abs(e[0]) for e in errors])),
        "last": None if np.isnan(whole[-1]) else float(whole[-1]), "baseline": float(np.concatenate(baseline).mean()),
    }  # fmt: skip
