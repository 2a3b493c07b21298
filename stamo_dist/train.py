"""The loop. Every stage, every strategy and every restart goes through `train`."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stamo_dist.checkpoint.compatibility import MAY_CHANGE_DATA, Identity, identify
from stamo_dist.checkpoint.load import holds_all, load_checkpoint
from stamo_dist.checkpoint.retention import clean
from stamo_dist.checkpoint.save import Saved, Saver
from stamo_dist.checkpoint.select import Choice, select_checkpoint, settle
from stamo_dist.data.loader import Batch, Cursor, build_loader, first_frames
from stamo_dist.data.mixture import Mixture
from stamo_dist.distributed import strategies
from stamo_dist.distributed.collectives import barrier, broadcast, everywhere, part
from stamo_dist.distributed.engine import Engine
from stamo_dist.distributed.rank import World, survive_launcher
from stamo_dist.errors import RecipeError, RunError, StamoError
from stamo_dist.exit_codes import EXIT_NOT_EXPORTED, EXIT_PREEMPTED
from stamo_dist.export import export, exported_step
from stamo_dist.faults.signals import Grace, Stop, requests
from stamo_dist.faults.watchdog import Watchdog
from stamo_dist.optim.ema import EMA
from stamo_dist.optim.optimizer import adamw, lr_at
from stamo_dist.pretrained.pin import as_begun, moved, pin
from stamo_dist.recipe.batching import Batching, batching
from stamo_dist.recipe.load import Loaded, dump
from stamo_dist.run.folder import RunFolder, git_commit
from stamo_dist.run.lease import Generation, take
from stamo_dist.run.state import RunState
from stamo_dist.tasks import build_task, check_task
from stamo_dist.tasks.base import Task
from stamo_dist.tasks.noise import Noise
from stamo_dist.tracking.logger import Journal
from stamo_dist.tracking.metrics import Reducer, StepSums, Stopwatch
from stamo_dist.tracking.pictures import save_grid
from stamo_dist.training import divergence, trial_export
from stamo_dist.training.evaluation import Evaluation

_AGAIN = f"Leaving with code {EXIT_PREEMPTED} to be started again"


def train(
    loaded: Loaded, world: World, *, resume: str = "auto", allowed: frozenset[str] = frozenset(),
    evaluation: Evaluation | None = None,
) -> int:  # fmt: skip
    """Train the recipe to its end or until asked to stop; every process of the run calls it.

    `resume`: "auto" continues the newest whole checkpoint of the run folder, "none" insists on a fresh folder, anything
    else is the path of a checkpoint or a run. `allowed`: flags that let the recipe differ from the checkpoint's.
    `evaluation`: rank 0's, what the recipe's `evaluate` calls for.
    Returns the exit code: 0 when finished, `EXIT_PREEMPTED` when it was asked to stop.

    Raises:
        StamoError: Recipe, data, run folder or checkpoint cannot be used as asked; nothing was trained.
    """
    run, limits = RunFolder(Path(loaded.recipe.run_dir)), loaded.recipe.train
    stop = Stop(world.rank, limits.checkpoint.grace_seconds)
    with closing(Watchdog(run.logs, world, limits)) as watchdog:
        watchdog.mark("building for", 1)
        return _begin(loaded, world, run, stop, watchdog, evaluation or Evaluation(), resume, allowed)


def _begin(
    loaded: Loaded, world: World, run: RunFolder, stop: Stop, watchdog: Watchdog, evaluation: Evaluation, resume: str,
    allowed: frozenset[str],
) -> int:  # fmt: skip
    """Look at everything that may be refused, take the run folder, and do all of it."""
    recipe = loaded.recipe
    try:
        plan = batching(recipe.train, world.size)
    except ValueError as e:
        raise RecipeError([str(e)]) from None
    choose = partial(select_checkpoint, run.checkpoints, resume, allowed=allowed)
    growth = {} if MAY_CHANGE_DATA in allowed else _recorded(choose).growth
    mixture = Mixture(recipe.data, seed=recipe.seed, global_batch=recipe.train.global_batch, growth=growth)
    if mixture.steps is not None and mixture.steps < recipe.train.steps:
        raise RecipeError([
            f"train.steps: {recipe.train.steps}, but data.sources.*.max_epochs lets the data end after {mixture.steps}"
        ])  # fmt: skip
    check_task(recipe, mixture)
    identity = identify(recipe, mixture)
    if not world.is_main:  # one process looks, so that all see the same
        return _go(loaded, world, run, mixture, identity, plan, None, choose, evaluation, stop, watchdog)
    choose(identity)  # what is refused is refused before anything is written
    run.prepare()
    with take(run.path) as generation:
        generation.notes += clean(run.checkpoints, generation.number)
        return _go(loaded, world, run, mixture, identity, plan, generation, choose, evaluation, stop, watchdog)


def _go(
    loaded: Loaded, world: World, run: RunFolder, mixture: Mixture, identity: Identity, plan: Batching,
    generation: Generation | None, choose: Callable[..., Choice], evaluation: Evaluation, stop: Stop,
    watchdog: Watchdog,
) -> int:  # fmt: skip
    """Build everything, go back to where the run stood, train and export."""
    begun = _recorded(choose).sources
    recipe, pinned = as_begun(loaded.recipe, begun)
    torch.manual_seed(recipe.seed)  # every process builds the same initial weights
    task = build_task(recipe, mixture, meta_init=recipe.strategy.name in strategies.SUPPORTS_META_INIT)
    changed = moved(task.sources, begun)
    if recipe.strategy.name in strategies.ZERO_STAGE and (bases := [line for line in changed if "(base)" in line]):
        raise RunError(  # DeepSpeed's checkpoints lack what is frozen
            f"{bases[0]}; name that commit as `revision` in the adapter's adapter_config.json, or train "
            "under fsdp, hsdp or ddp, whose checkpoints hold the base"
        )
    pinned += changed
    recipe = pin(recipe, task.sources)  # the export reads the same commits, should a branch move meanwhile
    loaded = replace(loaded, recipe=recipe)
    identity = identity.having(task.frozen)
    choose = partial(choose, identity)
    how: dict[str, Any] = {
        "strategy": recipe.strategy, "world": world, "batching": plan, "clip": recipe.optimizer.clip,
        "precision": recipe.train.precision, "block_classes": task.block_classes,
    }  # fmt: skip
    accelerator = strategies.connect(**how)
    watchdog.meet()
    if not everywhere(broadcast(mixture.fingerprint) == mixture.fingerprint):
        if world.is_main:
            print(f"{run.path}: the processes see different data: a source changed while they started. {_AGAIN}")
        return EXIT_PREEMPTED
    start, notes = settle(run.checkpoints, world, lambda bad: choose(without=bad))
    if task.init_frames and start is None:
        task.initialise(first_frames(mixture, task.init_frames))
    engine = strategies.build(task.trained, adamw(task.trained, recipe.optimizer), accelerator=accelerator, **how)
    survive_launcher()
    task.place(engine.device, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    if start is None or not holds_all(start):
        task.load_weights()
    ema = EMA(engine.unwrapped, recipe.train.ema) if recipe.train.ema else None
    none = [0] * len(mixture.sources)
    state = RunState(cursor=Cursor().to_dict(), samples=none, skipped=none)
    if start is not None:
        state = load_checkpoint(
            start, engine, ema, precision=recipe.train.precision, sources=mixture.sources, say=notes.append
        )
        state.cursor = broadcast(divergence.BadBatches(run.bad_batches, mixture).after(state.cursor))
    # Rank 0's word on both: a shared disk may show the others an older folder.
    exported = broadcast(state.step >= recipe.train.steps and exported_step(run) == state.step)
    if exported and not broadcast(evaluation.pending(state.step)):
        if world.is_main:
            print("\n".join([*notes, f"{run.path}: already trained to step {state.step}"]))
        return 0
    session = _Session(loaded, run, mixture, identity, task, engine, ema, plan, state, generation, evaluation, watchdog)
    if generation is not None:
        notes = [*pinned, *notes, *([f"continuing {start} after step {state.step}"] if start else [])]
        session.open([*generation.notes, *notes])
    barrier()
    try:
        code = session.run(stop)
        if code == 0 and not exported:
            with stop.nothing_to_save("exporting", partial(_give_back, evaluation, generation)):
                code = _export(session)
        if code == 0 and recipe.evaluate.beside and not _wait(evaluation, session, stop):
            code = EXIT_PREEMPTED
    finally:
        watchdog.mark("leaving after", session.state.step)
        evaluation.close()
        session.journal.close()
    return code


def _export(session: _Session) -> int:
    """Rank 0 writes the model while the others wait; a model that cannot be written loses no training."""
    step, run, problem = session.state.step, session.run_folder, None
    session.watchdog.mark("exporting after", step)
    if session.main:
        try:
            export(session.recipe, session.mixture, run, step)
        except (StamoError, OSError) as e:
            problem = str(e)
        except Exception:
            problem = traceback.format_exc()
    problem = broadcast(problem)
    if problem is None:
        return 0
    if session.main:
        session.journal.say(
            f"error: {run.path}: trained to step {step} and saved, but the model was not exported: {problem}\n"
            f"`stamo export {run.path}` writes it once that is mended; leaving with code {EXIT_NOT_EXPORTED}"
        )
    return EXIT_NOT_EXPORTED


def _give_back(evaluation: Evaluation, generation: Generation | None) -> None:
    evaluation.close()
    if generation is not None:
        generation.end()


def _recorded(choose: Callable[[], Choice]) -> Choice:
    """What the checkpoint says of its weights and data; every process reads it before they are connected."""
    try:
        return choose()
    except StamoError:
        return Choice(None)  # rank 0 says what is wrong


def _wait(evaluation: Evaluation, session: _Session, stop: Stop) -> bool:
    """Let all processes but the first go, which waits for what is measured beside it; False when asked to stop."""
    session.watchdog.close()  # it may take hours, and who is alone holds nobody up
    part()
    whole = evaluation.finish(lambda: stop.asked)
    if session.main:
        session.guard()
        session.saver.prune()  # what was held for it
    return whole


class _Session:
    """One start of the run, from `state` to the end or to the next stop."""

    def __init__(
        self, loaded: Loaded, run: RunFolder, mixture: Mixture, identity: Identity, task: Task, engine: Engine,
        ema: EMA | None, plan: Batching, state: RunState, generation: Generation | None,
        evaluation: Evaluation, watchdog: Watchdog,
    ):  # fmt: skip
        self.loaded, self.recipe, self.run_folder, self.mixture = loaded, loaded.recipe, run, mixture
        self.task, self.engine, self.ema, self.plan, self.state = task, engine, ema, plan, state
        self.main, self.evaluation, self.watchdog = engine.world.is_main, evaluation, watchdog
        self.reducer = Reducer(engine.device, engine.world.rank, engine.world.size)
        self.grace = Grace(run.logs / "leaving.json", self.recipe.train.checkpoint.grace_seconds)
        self.signals: dict[int, str] = {}  # rank → the signal that asks the run to stop
        self.saver = Saver(
            run.checkpoints, engine, ema, self.recipe.train.checkpoint, identity=identity,
            precision=self.recipe.train.precision, git_commit=git_commit(), sources=task.sources,
            generation=generation, needed=evaluation.needed,
        )  # fmt: skip
        flops = task.flops_per_sample() if engine.device.type == "cuda" else None
        self.guard: Callable[[], None] = generation.check if generation else lambda: None
        self.journal = Journal(
            self.recipe, loaded.resolved, run, engine.world, mixture.sources, flops, state.step, guard=self.guard
        )

    def open(self, notes: list[str]) -> None:
        """Rank 0: write what this run is and say it."""
        self.run_folder.describe(
            self.loaded.text,
            dump(self.recipe),
            sys.argv,
            step=self.state.step,
            processes=self.plan.world_size,
            sources=self.task.sources,
        )
        r, p = self.recipe, self.plan
        parameters = sum(getattr(x, "ds_numel", x.numel()) for x in self.task.trained.parameters() if x.requires_grad)
        self.journal.say(
            f"{r.name}: {r.strategy.name} {r.train.precision} on {p.world_size} × {self.engine.device.type}, "
            f"global batch {r.train.global_batch} = {p.world_size} × {p.accumulation} × {p.micro_batch}, "
            f"{parameters / 1e6:.1f} M trained parameters, {r.train.steps} steps → {self.run_folder.path}"
        )
        for note in [*self.mixture.notes, *self.task.notes, *notes, *self.grace.notes()]:
            self.journal.say(f"  {note}")

    def run(self, stop: Stop) -> int:
        """Train until the end or a stop; returns the exit code."""
        while (code := self._train(stop)) is None:
            self._roll_back()
        return code

    def _train(self, stop: Stop) -> int | None:
        """The loop. Returns 0 at the end, `EXIT_PREEMPTED` after a stop, None after too many bad steps in a row."""
        recipe, engine, state, working = self.recipe, self.engine, self.state, self.watchdog.mark
        noise = Noise(recipe.seed)
        self._measure(state.step, partial(self.evaluation.begin, state.step, self.journal))
        loader = build_loader(
            self.mixture, rank=engine.world.rank, world_size=engine.world.size,
            cursor=Cursor.from_dict(state.cursor), pin_memory=engine.device.type == "cuda", latents=self.task.latents,
            states=self.task.states, groups=self.plan.workers,
        )  # fmt: skip
        watch, first = Stopwatch(engine.device), state.step + 1
        with closing(loader):
            batches = iter(loader)
            while state.step < recipe.train.steps:
                step = state.step + 1
                working("waiting for the data of", step)
                waiting = time.perf_counter()
                batch = next(batches)
                watch.waited += time.perf_counter() - waiting
                self._show_first(step, batch)
                update = step - state.bad_steps
                lr = lr_at(update, recipe.train.steps, recipe.optimizer)
                engine.set_lr(lr, update)
                sums = StepSums.empty(self.task.terms, len(self.mixture.sources), engine.device)
                micros = batch.to(engine.device).split(self.plan.micro_batch)
                if step == first:
                    engine.rehearse(lambda: self.task.loss(engine.module, micros[0], noise.at(first)).loss)  # noqa: B023
                for micro in micros:
                    working("computing", step)
                    with engine.accumulate():
                        out = self.task.loss(engine.module, micro, noise.at(step))
                        sums.add(out.per_sample, micro.source, micro.replaced, out.present)
                        watch.meet()
                        working("differentiating", step)
                        grad_norm = engine.backward(out.loss)
                assert grad_norm is not None, "the last micro-batch of a step must step the optimizer"
                good = math.isfinite(grad_norm)
                if good and self.ema is not None:
                    self.ema.update(update)
                self._log()  # the step before this one, which the device has finished
                state.step, state.cursor = step, batch.cursor.to_dict()
                divergence.count_step(state, good=good)
                self.reducer.put(
                    step, sums, grad_norm=grad_norm, lr=lr, lap=watch.lap(), signal=stop.signal or 0
                )  # fmt: skip
                self.journal.read(step, batch)
                self.watchdog.finished(step)
                hopeless = state.bad_in_a_row >= recipe.train.max_bad_steps
                last = step == recipe.train.steps
                trial = first == 1 and self._wants_rehearsal(step)
                kind = self.saver.due(step, last=last) or ("temporary" if trial else None)
                if not (self.signals or hopeless or kind):
                    if self._report(self.saver.poll()):
                        watch.reset()
                    continue
                self._log()
                if hopeless:
                    working("saving", step)
                    self._report(self.saver.poll(wait=True))
                    return None
                if (code := self._save(kind or "temporary", last=last, trial=trial)) is not None:
                    return code
                watch.reset()
        return 0

    def _save(self, kind: str, *, last: bool, trial: bool) -> int | None:
        """Save the state, and with `trial` export it; the exit code where the run leaves."""
        step, waits = self.state.step, last or trial or bool(self.signals)
        self.watchdog.mark("saving", step)
        if waits:
            self._report(self.saver.poll(wait=True))  # and measure it, while it is there
            self.watchdog.mark("saving", step)
        self.journal.sync()
        ended = self.saver.save(self.state, kind, wait=waits)
        self._report(ended)
        if last and ended[-1].error:
            raise RunError(f"the last step could not be saved: {ended[-1].error}; make room and start again")
        if self.signals and not last:
            self.journal.say(
                f"{requests(self.signals)}: {ended[-1]}; leaving with code {EXIT_PREEMPTED} to be started again"
            )
            return EXIT_PREEMPTED
        self._rehearse(step, trial and not ended[-1].error)
        return None

    def _wants_rehearsal(self, step: int) -> bool:
        here = step == trial_export.STEP < self.recipe.train.steps
        return here and broadcast(trial_export.wanted(self.recipe, self.step_seconds))

    def _rehearse(self, step: int, wanted: bool) -> None:
        """Raises: RunError: What is trained could not be exported."""
        if not wanted:
            return
        self.watchdog.mark("exporting on trial after", step)
        problem, notes = (
            trial_export.rehearse(self.recipe, self.mixture, self.run_folder, step) if self.main else (None, [])
        )
        for note in notes:
            self.journal.say(f"  {note}")
        if problem := broadcast(problem):
            raise RunError(
                f"train.dry_export: the model could not be exported at the end of this run: {problem}\nmend that and "
                f"start again: it goes on after step {step}"
            )

    def _roll_back(self) -> None:
        """Go on from the last good checkpoint, without the batches that were read since."""
        self.state, notes = divergence.roll_back(
            self.run_folder, self.mixture, self.engine, self.ema, self.state, self.recipe.train, self.guard
        )
        self.journal.rewind(self.state.step)
        for note in notes:
            self.journal.say(note)

    def _log(self) -> None:
        """Take in what the ranks said about the step that was finished last, and what was measured beside it."""
        self.evaluation.poll()
        reduced = self.reducer.take()
        if reduced is not None:
            self.signals, self.step_seconds = self.signals or reduced.signals, reduced.seconds
            self.state.seconds += reduced.seconds
            self.state.samples = [a + b for a, b in zip(self.state.samples, reduced.counts, strict=True)]
            self.state.skipped = [a + b for a, b in zip(self.state.skipped, reduced.skipped, strict=True)]
            self.journal.step(reduced, self.state)
            divergence.check_skipped(self.state, self.mixture.sources, self.recipe.data)

    def _report(self, ended: list[Saved]) -> bool:
        """Tell what became of these saves, and measure those that are due for it; whether any was measured."""
        measured = False
        for saved in ended:
            self.journal.say(str(saved))
            self.journal.fact(**saved.facts())
            self.watchdog.saving_takes = max(self.watchdog.saving_takes, saved.seconds)
            if self.main and saved.error is None and not saved.beside:
                for note in self.grace.measured(self.step_seconds, saved.seconds):
                    self.journal.say(f"  {note}")
            if saved.error is None and not self.signals:
                measured = self._measure(saved.step, partial(self.evaluation.saved, saved.step)) or measured
        return measured

    def _measure(self, step: int, measure: Callable[[], bool | None]) -> bool:
        """Rank 0 measures; where that holds the training up, the others know and wait here. Whether it did."""
        if not self.recipe.evaluate.holds_up(step):
            return bool(measure())
        self.watchdog.mark("evaluating", step)
        measure()
        barrier()
        return True

    def _show_first(self, step: int, batch: Batch) -> None:
        if step > 1 or not self.main:
            return
        picture = self.run_folder.path / "first_batch.png"
        try:
            save_grid(picture, batch.images[:32], [self.mixture.sources[s] for s in batch.source[:32].tolist()])
            self.journal.picture("first_batch", picture, 1)
        except OSError as e:
            self.journal.say(f"{picture}: not written ({e.strerror})")
