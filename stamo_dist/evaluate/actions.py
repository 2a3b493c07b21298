"""How far a policy's chunks are from what was done in held-out episodes; beside it, what the mean action would give."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from stamo_dist.data.frames import Episodes
from stamo_dist.data.sources import open_source
from stamo_dist.engine.runfolder import RunFolder, git_commit, open_run
from stamo_dist.errors import CheckpointError, DataError, RunError
from stamo_dist.evaluate.common import Provenance, Result, output_folder, progress
from stamo_dist.evaluate.held_out import SPLIT, pick_frames
from stamo_dist.models.openvla.framing import AS_RECORDED, Use
from stamo_dist.models.policies import AnyPolicy, load_policy
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe

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
    """The cameras of one labelled source's held-out episodes."""

    name: str
    cameras: list[Episodes]
    instruction: str


def actions(
    run_path: Path, *, frames: int = 256, batch: int = 16, out: Path | None = None, console: Console | None = None
) -> Result:
    """Measure the exported policy of a run and write RUN/eval/actions/.

    `frames`: most of each source. `batch`: moments at once.

    Raises:
        StamoError: No such run, it trains no policy or has not ended, or a source has nothing held out.
    """
    console = console or Console()
    run = open_run(run_path)
    recipe = load(run.resolved).recipe
    policy, provenance = open_policy(run, recipe)
    watched = _open(recipe, policy)
    seen = "; ".join(f"{source.name}: {', '.join(camera.camera for camera in source.cameras)}" for source in watched)
    console.print(
        f"{seen}; {policy.framing.said()}; {policy.chunk} actions at a time, scaled by {policy.cfg.bounds}",
        soft_wrap=True,
    )
    folder = output_folder(run, NAME, out)
    rows = []
    with progress(console) as bar:
        task = bar.add_task("frames", total=frames * len(watched))
        for source in watched:
            rows.append(_measure(policy, source, frames, batch, lambda n: bar.advance(task, n)))
        bar.update(task, completed=frames * len(watched))
    result = Result(
        NAME, "Held-out action error", _ABOUT, _COLUMNS, rows,
        {"frames": frames, "chunk": policy.chunk, "framing": policy.framing.to_dict()}, provenance,
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
    return policy, provenance_of(recipe, str(run.model), step)


def provenance_of(recipe: Recipe, weights: str, step: int) -> Provenance:
    """Of a policy's exported weights."""
    return Provenance(
        recipe=recipe.name, data_fingerprint=None, checkpoint=weights, step=step,
        ema=bool(step) and recipe.train.ema is not None, trained_commit=None, git_commit=git_commit(), seed=recipe.seed,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip


def _open(recipe: Recipe, policy: AnyPolicy) -> list[Watched]:
    found, problems = [], []
    for name, source in recipe.data.used.items():
        if name not in policy.statistics.sources:
            continue  # a video
        try:
            path, cache = source.paths[0], recipe.data.cache
            manifest = open_source(path, cache).manifest
            if SPLIT not in manifest.splits or not manifest.splits[SPLIT].frames:
                raise DataError(f"{path} has no {SPLIT!r} split; convert it anew with a --val-fraction above 0")
            cameras = (source.cameras or manifest.cameras)[: policy.cfg.views]
            opened = [Episodes(path, SPLIT, camera, cache=cache) for camera in cameras]
            found.append(Watched(name, opened, source.instruction or ""))
        except DataError as e:
            problems.append(f"data.sources.{name}: {e}")
    if problems:
        raise DataError("\n".join(problems))
    return found


def _measure(policy: AnyPolicy, source: Watched, frames: int, batch: int, advance: Any) -> dict[str, Any]:
    first = source.cameras[0]
    ranges = policy.statistics.range(source.name, "action", policy.cfg.bounds)
    mean = ranges.normalise(np.asarray(policy.statistics.sources[source.name]["action"]["mean"]))
    errors, wholes, baseline = [], [], []
    picks = pick_frames(first, frames)
    for start in range(0, len(picks), batch):
        part = picks[start : start + batch]
        images = [[camera.frames(p.episode, [p.t])[0] for camera in source.cameras] for p in part]
        texts = [first.episodes[p.episode].instruction or source.instruction for p in part]
        felt = None
        if policy.cfg.proprio:
            felt = np.concatenate([first.proprio(p.episode, [p.t]) for p in part])
        chunks = policy.act_batch(images, texts, unnorm_key=source.name, proprio=felt)
        for pick, chunk in zip(part, chunks, strict=True):
            stop = min(pick.t + policy.chunk, first.episodes[pick.episode].length)
            taken = first.actions(pick.episode, range(pick.t, stop)).astype(np.float64)
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
