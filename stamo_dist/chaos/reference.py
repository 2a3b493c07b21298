"""The undisturbed reference of a training with faults, with the same number of processes in each step.

The final result of a step was computed by the last start that began before it. The reference computes each step on as
many processes as that start had, so sums run in the same order, and the two must agree bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from stamo_dist.chaos.monitor import HungError, Monitor, TrainingStart, tail
from stamo_dist.chaos.starts import Starter, Tree
from stamo_dist.checkpoint.manifest import MANIFEST
from stamo_dist.checkpoint.retention import folder_of
from stamo_dist.errors import RunError
from stamo_dist.exit_codes import EXIT_PREEMPTED


@dataclass(frozen=True)
class RunSegment:
    """Consecutive steps whose final result was computed on one number of processes."""

    processes: int
    last: int | None  # last step; None: to the end


def segments(begun: Sequence[TrainingStart]) -> list[RunSegment]:
    """The segments of a training, from all its starts in order."""
    found: list[RunSegment] = []
    last: int | None = None
    for start in reversed(begun):
        if last is not None and start.after >= last:
            continue  # all of its steps were repeated by a later start
        if not found or found[-1].processes != start.processes:
            found.append(RunSegment(start.processes, last))
        last = start.after
    return found[::-1]


def train(starter: Starter, arguments: Sequence[str], run: Path, todo: Sequence[RunSegment], patience: float) -> None:
    """Train in `run`, each segment on its number of processes; output goes to `run`.log.

    A segment saves after its last step and is stopped; the next continues from its checkpoint.

    Args:
        starter: Starts its processes.
        arguments: `stamo` arguments of the training, without the number of processes.
        run: The run folder.
        todo: All segments, in order.
        patience: Seconds without a change after which it counts as hung.

    Raises:
        RunError: It hung or failed.
    """
    monitor, log = Monitor(run, patience), run.with_name(f"{run.name}.log")
    resume: list[str] = []
    for segment in todo:
        saved, settings = None, []
        if segment.last is not None:
            saved = folder_of(run / "checkpoints", segment.last)
            shutil.rmtree(saved, ignore_errors=True)  # the previous segment may have got this far before it stopped
            # Save at the segment's last step; keep_every keeps that checkpoint if the start runs on.
            settings = [f"{name}={segment.last}" for name in ("every", "keep_every")]
            settings += ["ephemeral_every=null", "background=false"]
        given = [*arguments, *resume, *(x for s in settings for x in ("--set", f"train.checkpoint.{s}"))]
        start = starter.start(given, log, segment.processes, run)
        tree = Tree(start, segment.processes)
        try:
            if saved is not None:
                monitor.until(
                    lambda saved=saved, tree=tree: (saved / MANIFEST).exists() or tree.gone,  # type: ignore[misc]
                    f"save step {segment.last}",
                )
                with suppress(psutil.NoSuchProcess):
                    if tree.launcher is not None:
                        tree.launcher.terminate()
            monitor.until(lambda tree=tree: tree.gone, "end")  # type: ignore[misc]
        except HungError as e:
            raise RunError(
                "\n    ".join([f"{run}: without any fault, {e}; its output ends with", *tail(log)])
            ) from None
        finally:
            tree.kill()
        code = start.poll()
        if code not in ((0,) if saved is None else (0, EXIT_PREEMPTED)):
            raise RunError("\n    ".join([f"{run}: without any fault, it ended with code {code}:", *tail(log)]))
        resume = ["--resume", str(saved)]
