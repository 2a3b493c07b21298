"""The entry point: `train` checks, acquires the run folder, trains and exports."""

from __future__ import annotations

import os
import traceback
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

from stamo_dist.checkpoint.retention import clean
from stamo_dist.data.node import NodeShare
from stamo_dist.distributed.collectives import barrier, broadcast, part
from stamo_dist.distributed.rank import EXPORTS_LATER, World
from stamo_dist.errors import StamoError
from stamo_dist.exit_codes import EXIT_NOT_EXPORTED, EXIT_PREEMPTED
from stamo_dist.export import export
from stamo_dist.faults.signals import ShutdownRequest
from stamo_dist.faults.watchdog import Watchdog
from stamo_dist.recipe.load import Loaded
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.lease import LeaseEnd, acquire, nothing_if_refused
from stamo_dist.training.evaluation import Evaluation
from stamo_dist.training.setup import Checked, RunStart, Session, build, check


def train(
    loaded: Loaded,
    world: World,
    *,
    resume: str = "auto",
    allowed: frozenset[str] = frozenset(),
    evaluation: Evaluation | None = None,
) -> int:
    """Train the recipe to its end or until asked to stop; every process of the run calls it.

    `resume`: "auto" continues the newest complete checkpoint of the run folder, "none" requires a fresh folder,
    anything else is the path of a checkpoint or a run. `allowed`: flags that let the recipe differ from the
    checkpoint's. `evaluation`: rank 0's, for the recipe's `evaluate`.
    Returns the exit code: 0 when finished, `EXIT_PREEMPTED` when it was asked to stop.

    Raises:
        StamoError: Recipe, data, run folder or checkpoint cannot be used as asked; nothing was trained.
    """
    run, limits = RunFolder(Path(loaded.recipe.run_dir)), loaded.recipe.train
    stop = ShutdownRequest(world.rank, limits.checkpoint.grace_seconds)
    node = NodeShare(str(run.path), world.on_node, world.rank)
    undone = nothing_if_refused(run.path) if world.is_main else nullcontext()
    with undone, closing(Watchdog(run.logs, world, limits)) as watchdog, closing(node):
        watchdog.mark("building for", 1)
        start = RunStart(loaded, world, run, stop, watchdog, evaluation or Evaluation(), resume, allowed, node)
        checked = check(start)
        if not world.is_main:  # one process checks, so that all see the same result
            return _train(start, checked)
        checked.select(checked.fingerprint)  # all checks run before anything is written
        run.prepare()
        with acquire(run.path) as start.lease:
            run.prepare()  # a start that was refused while this one waited has taken its folders back
            stop.before_interrupt = partial(start.lease.end, LeaseEnd("stopped", "by hand (Ctrl-C twice)"))
            start.notes += [*start.lease.notes, *clean(run.checkpoints, start.lease.number)]
            code = _train(start, checked)
            if code == EXIT_NOT_EXPORTED:
                how = f"trained, not exported; `stamo export {run.path}` writes the model"
                start.lease.end(LeaseEnd("failed", how))
            return code


def _train(start: RunStart, checked: Checked) -> int:
    session = build(start, checked)
    if isinstance(session, int):
        return session
    trainer, evaluation = session.trainer, start.evaluation
    barrier()
    code = EXIT_PREEMPTED
    try:
        code = int(trainer.fit())
        if code == 0 and not session.exported and EXPORTS_LATER in os.environ:
            session.logger.info("the model is exported by a process of its own, on one node")
        elif code == 0 and not session.exported:
            with start.stop.nothing_to_save("exporting", partial(_give_back, start)):
                code = _export(start, session)
        if code == 0 and start.recipe.evaluate.beside and not _wait_for_evaluation(start, session):
            code = EXIT_PREEMPTED
    finally:
        start.watchdog.mark("leaving after", trainer.state.step)
        evaluation.close()
        if code == 0:
            session.saver.close()
        session.logger.close()
    return code


def _export(start: RunStart, session: Session) -> int:
    """Rank 0 exports the model while the others wait; a failed export loses no training."""
    step, run, problem = session.trainer.state.step, start.run, None
    start.watchdog.mark("exporting after", step)
    if start.world.is_main:
        try:
            export(start.recipe, session.mixture, run, step)
        except (StamoError, OSError) as e:
            problem = str(e)
        except Exception:
            problem = traceback.format_exc()
    problem = broadcast(problem)
    if problem is None:
        return 0
    if start.world.is_main:
        session.logger.info(
            f"error: {run.path}: trained to step {step} and saved, but the model was not exported: {problem}\n"
            f"`stamo export {run.path}` writes it once that is mended; leaving with code {EXIT_NOT_EXPORTED}"
        )
    return EXIT_NOT_EXPORTED


def _give_back(start: RunStart) -> None:
    start.evaluation.close()
    if start.lease is not None:
        start.lease.end()


def _wait_for_evaluation(start: RunStart, session: Session) -> bool:
    """Rank 0 waits for background measurements, the others exit; False if asked to stop."""
    start.watchdog.close()  # it may take hours, and a single process blocks no other
    part()
    whole = start.evaluation.finish(lambda: start.stop.asked)
    if start.world.is_main:
        session.guard()
        session.saver.prune()  # checkpoints kept for it
    return whole
