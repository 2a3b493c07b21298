"""Building a trainer from a recipe, at the point where the run stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from stamo_dist.checkpoint.compatibility import MAY_CHANGE_DATA, RunFingerprint, in_order, run_fingerprint
from stamo_dist.checkpoint.load import load_checkpoint
from stamo_dist.checkpoint.manifest import Checkpoint
from stamo_dist.checkpoint.save import Origin, Saver
from stamo_dist.checkpoint.select import RecordedInputs, ResumePoint, select_checkpoint, verify_or_fall_back
from stamo_dist.data.at_hand import to_encode
from stamo_dist.data.loader import CacheKeys, Cursor, Loader, Sharing, build_loader, cache_use, first_frames
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.node import NodeShare
from stamo_dist.device import Device
from stamo_dist.distributed.collectives import before_connecting, broadcast, everywhere
from stamo_dist.distributed.engine import Engine, Phase
from stamo_dist.distributed.rank import World, survive_launcher
from stamo_dist.distributed.strategies import SUPPORTS_META_INIT, EngineSpec
from stamo_dist.errors import RecipeError, RunError, StamoError
from stamo_dist.exit_codes import EXIT_PREEMPTED
from stamo_dist.faults.signals import ShutdownBudget, ShutdownRequest
from stamo_dist.faults.watchdog import Watchdog
from stamo_dist.optim.ema import EMA
from stamo_dist.optim.optimizer import adamw
from stamo_dist.optim.schedule import RateSchedule
from stamo_dist.pretrained.pin import as_begun, moved, pin
from stamo_dist.recipe.batching import Batching, batchings, described
from stamo_dist.recipe.difference import Change
from stamo_dist.recipe.load import Loaded, dump
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run import lineage
from stamo_dist.run.code import code_version
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.lease import RunLease
from stamo_dist.run.recipe_history import changes_of
from stamo_dist.run.state import RunState
from stamo_dist.run.trained import already_trained, beyond
from stamo_dist.tasks import build_task, check_task
from stamo_dist.tasks.base import Task
from stamo_dist.tracking.logger import RunLogger
from stamo_dist.tracking.metrics import Reducer, Stopwatch
from stamo_dist.training import hooks
from stamo_dist.training.changes import changes, schedule_of
from stamo_dist.training.compiled import CompiledHook
from stamo_dist.training.divergence import BadBatches, roll_back
from stamo_dist.training.evaluation import Evaluation
from stamo_dist.training.initial import Initial, find, open_initial, resumed_notes, without_effect
from stamo_dist.training.profiling import ProfileHook, SyncGuardHook
from stamo_dist.training.trainer import Hook, Trainer
from stamo_dist.training.trial_export import TrialExport


@dataclass
class RunStart:
    """One start of a run: its request and this process's rank."""

    loaded: Loaded
    world: World
    run: RunFolder
    stop: ShutdownRequest
    watchdog: Watchdog
    evaluation: Evaluation
    resume: str
    allowed: frozenset[str]
    node: NodeShare
    lease: RunLease | None = None  # rank 0's
    notes: list[str] = field(default_factory=list)  # notes for the user, on rank 0
    changes: list[Change] = field(default_factory=list)  # of the recipe since the last start, on rank 0

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe


@dataclass
class Checked:
    """The results of checks before anything is written or built."""

    mixture: Mixture
    fingerprint: RunFingerprint
    batchings: list[Batching]  # of each size of global batches
    select: Callable[..., ResumePoint]  # `select_checkpoint` with this start's arguments except the fingerprint
    begun: RecordedInputs
    initial: str | None  # where the weights lie that the run begins with


@dataclass
class Session:
    """A trainer, and the objects needed at the end of the run."""

    trainer: Trainer
    mixture: Mixture
    logger: RunLogger
    saver: Saver
    guard: Callable[[], None]  # raises if this start may no longer write
    exported: bool  # an earlier start has finished training and export


def check(start: RunStart) -> Checked:
    """Run all checks; writes nothing.

    Raises:
        StamoError: Recipe or data cannot be used as asked.
    """
    recipe = start.recipe
    try:
        plans = batchings(recipe.train, start.world.size)
    except ValueError as e:
        raise RecipeError([str(e)]) from None
    select = partial(select_checkpoint, start.run.checkpoints, start.resume, allowed=start.allowed)
    begun = RecordedInputs(**before_connecting(start.world, "begun", lambda: asdict(_recorded(select))))
    first = begun.step is None
    lacking = partial(to_encode, start.loaded, every=first)
    if missing := before_connecting(start.world, "to_encode", lambda: [misfit.text for misfit in lacking()]):
        raise RecipeError(missing)
    data_begun = RecordedInputs() if MAY_CHANGE_DATA in start.allowed else begun
    data = in_order(recipe.data, data_begun.order)
    if data != recipe.data:
        start.notes.append(
            "data.shuffle.order: the run goes on in the order of groups, in which it began; a new run has lanes"
        )
    size, growth = recipe.train.global_batch, data_begun.growth
    mixture = Mixture(data, seed=recipe.seed, global_batch=size, growth=growth, node=start.node)
    if mixture.steps is not None and mixture.steps < recipe.train.steps:
        ends = f"data.sources.*.max_epochs lets the data end after {mixture.steps}"
        raise RecipeError([f"train.steps: {recipe.train.steps}, but {ends}"])
    for begin in mixture.batches.starts:
        cursor = Cursor(mixture.batches.before(begin))
        if use := cache_use(mixture, world_size=start.world.size, node=start.world.on_node, cursor=cursor):
            use.check(mixture.cache)
    check_task(recipe, mixture)
    look = partial(find, recipe, start.run.path, start.notes.append)
    found = before_connecting(start.world, "init_from", lambda: look() if first else None)
    return Checked(mixture, run_fingerprint(recipe, mixture), plans, select, begun, found)


def build(start: RunStart, checked: Checked) -> Session | int:
    """Build everything and restore the run's state; every process calls it.

    Returns an exit code if there is nothing to train, or not now.

    Raises:
        StamoError: Weights or checkpoint cannot be used as asked.
    """
    initial = open_initial(start.recipe, checked.initial)
    task, pinned = _build_task(start, checked, initial)
    recipe, world, run, mixture = start.recipe, start.world, start.run, checked.mixture
    spec = EngineSpec(
        recipe.strategy, world, checked.batchings[0], recipe.optimizer.clip, recipe.train.precision, task.block_classes
    )
    accelerator = spec.connect()
    start.watchdog.ranks_connected()
    if not everywhere(broadcast(mixture.fingerprint) == mixture.fingerprint):
        return _start_again(start, ["the processes see different data: a source changed while they started"])
    start.node.met()
    fingerprint = checked.fingerprint.with_frozen(task.frozen)
    select = partial(checked.select, fingerprint)
    checkpoint, notes = verify_or_fall_back(run.checkpoints, world, lambda bad: select(without=bad))
    if checkpoint is None and recipe.init_from is not None and initial is None:
        return _start_again(start, notes, ", from init_from")
    if task.init_frames and checkpoint is None and (initial is None or initial.needs_frames):
        task.initialise(first_frames(mixture, task.init_frames))
    reads_weights = checkpoint is None or not checkpoint.manifest.holds_all
    reads_weights &= initial is None or not initial.gives_all(task.trained)
    engine = _build_engine(recipe, task, spec, accelerator, reads_weights=reads_weights)
    if initial is not None:
        initial.load(engine)
        start.notes += initial.notes(task.frozen)
    ema = EMA(engine, recipe.train.ema) if recipe.train.ema else None
    carried = list[str]()
    if checkpoint is None:
        none = [0] * len(mixture.sources)
        state = RunState(cursor=Cursor().to_dict(), samples=none, skipped=none)
    else:
        precision, sources = recipe.train.precision, mixture.sources
        state = load_checkpoint(checkpoint, engine, ema, precision=precision, sources=sources, say=carried.append)
        state.cursor = broadcast(BadBatches(run.bad_batches, mixture).after(state.cursor))
        task.notes = resumed_notes(recipe.stage, task.trained, task.notes)
    schedule, changed = schedule_of(recipe, run, state, world)
    state.schedule = schedule.to_dict()
    # Decided by rank 0: a shared disk may show the others an older folder.
    exported = broadcast(state.step >= recipe.train.steps and run.exported_step == state.step)
    if exported and not broadcast(start.evaluation.pending(state.step)):
        if world.is_main:
            print("\n".join([*notes, already_trained(run.path, state.step, recipe.train.steps)]))
        return 0
    if world.is_main:
        start.changes, unknown = changes(recipe, run, checkpoint)
        notes += unknown
    if start.lease is not None:
        _record_parent(run.path, checkpoint, initial)
    start.notes += [
        *pinned,
        *notes,
        *carried,
        *changed,
        *beyond(run.path, state.step, recipe.train.steps),
        *([f"continuing {checkpoint.path} after step {state.step}"] if checkpoint else []),
    ]
    return _assemble(start, checked, task, engine, ema, state, fingerprint, exported=exported)


def _start_again(start: RunStart, why: list[str], how: str = "") -> int:
    if start.world.is_main:
        print("\n".join([*why, f"{start.run.path}: leaving with code {EXIT_PREEMPTED} to be started again{how}"]))
    return EXIT_PREEMPTED


def _build_engine(
    recipe: Recipe, task: Task, spec: EngineSpec, accelerator: Accelerator, *, reads_weights: bool
) -> Engine:
    """Build the engine and place the task; `reads_weights`: also load the weights that the recipe names."""
    if recipe.strategy.name not in SUPPORTS_META_INIT:
        spec.give_memory(task.trained, accelerator)  # not in host memory, which all processes of a node share
        if reads_weights:
            task.load_weights()
    engine = spec.build(task.trained, adamw(task.trained, recipe.optimizer), accelerator)
    survive_launcher()
    task.place(engine.device, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    if recipe.strategy.name in SUPPORTS_META_INIT and reads_weights:
        task.load_weights()
    return engine


def _record_parent(run: Path, checkpoint: Checkpoint | None, initial: Initial | None) -> None:
    """Rank 0: record where this start's state comes from, if that is not the run itself."""
    parent = initial.record if initial else None
    if checkpoint is not None:
        parent = lineage.resumed(checkpoint.path, checkpoint.manifest.state.step)
    if parent is None or Path(parent.run) != run.resolve():
        lineage.record(run, parent)


def _recorded(select: Callable[[], ResumePoint]) -> RecordedInputs:
    """The weights and data recorded in the checkpoint."""
    try:
        return select().begun
    except StamoError:
        return RecordedInputs()  # reported later, when it is selected with the fingerprint


def _build_task(start: RunStart, checked: Checked, initial: Initial | None) -> tuple[Task, list[str]]:
    """The task with the weights that the run began with, to which the recipe is pinned; and notes on pinning."""
    begun = checked.begun.sources
    recipe, notes = as_begun(start.recipe, begun)
    torch.manual_seed(recipe.seed)  # every process builds the same initial weights
    task = build_task(recipe, checked.mixture, meta_init=True, unfilled=initial is not None and initial.may_give_all)
    if initial is not None and not initial.meet(task.trained):
        torch.manual_seed(recipe.seed)
        task = build_task(recipe, checked.mixture, meta_init=True)
    if initial is not None:
        task.notes = initial.corrected(task.notes)
    if described := initial.described if initial else begun.get("init_from"):
        task.sources = {**task.sources, "init_from": described}
    changed = moved(task.sources, begun)
    if not checked.begun.holds_all and (bases := [line for line in changed if "(base)" in line]):
        raise RunError(
            f"{bases[0]}; the run's checkpoints, of an earlier format, do not hold it: name that commit as "
            "`revision` in the adapter's adapter_config.json"
        )
    # The export reads the same commits, even if a branch moves.
    start.loaded = replace(start.loaded, recipe=pin(recipe, task.sources))
    if checked.begun.step is not None:
        notes += without_effect(recipe, begun.get("init_from"))
    return task, [*notes, *changed]


def _assemble(
    start: RunStart,
    checked: Checked,
    task: Task,
    engine: Engine,
    ema: EMA | None,
    state: RunState,
    fingerprint: RunFingerprint,
    *,
    exported: bool,
) -> Session:
    """Assemble the trainer, with its hooks in calling order."""
    recipe, world, run, mixture, watchdog = start.recipe, start.world, start.run, checked.mixture, start.watchdog
    guard: Callable[[], None] = start.lease.check if start.lease else lambda: None
    device = Device.current()
    flops = task.flops_per_sample() if device.peak_flops else None
    logger = RunLogger(recipe, start.loaded.resolved, run, world, mixture.sources, flops, state.step, guard=guard)
    origin = Origin(fingerprint, recipe.train.precision, code_version(), task.sources)
    needed = start.evaluation.needed
    saver = Saver(run.checkpoints, engine, ema, recipe.train.checkpoint, origin, lease=start.lease, needed=needed)
    budget = ShutdownBudget(run.logs / "leaving.json", recipe.train.checkpoint.grace_seconds)
    clock = Stopwatch(device)
    evaluate = hooks.EvaluateHook(start.evaluation, recipe, logger, watchdog)
    log = hooks.LogHook(logger, Reducer(device, world.rank, world.size), clock, start.stop, recipe)
    trial = TrialExport(recipe, mixture, run, world, logger, watchdog)
    save = hooks.CheckpointHook(saver, log, evaluate, logger, watchdog, budget if world.is_main else None, trial)
    first = [hooks.FirstBatchHook(run.path / "first_batch.png", mixture.sources, logger)] if world.is_main else []
    beat = hooks.HeartbeatHook(watchdog)
    divergence = hooks.DivergenceHook(recipe.train.max_bad_steps, log, save)

    def on_phase(phase: Phase, step: int) -> None:
        watchdog.mark(phase.value, step)
        clock.enter(phase)

    def go_back(state: RunState) -> RunState:
        state, notes = roll_back(run, mixture, engine, ema, state, recipe.train, guard)
        state.schedule = trainer.schedule.to_dict()
        logger.rewind(state.step)
        for note in notes:
            logger.info(note)
        return state

    trainer = Trainer(
        recipe=recipe,
        task=task,
        engine=engine,
        ema=ema,
        state=state,
        schedule=RateSchedule.from_dict(state.schedule),
        batchings=checked.batchings,
        open_loader=_loader_factory(start, checked, task, device),
        on_phase=on_phase,
        hooks=[
            *first,
            hooks.BatchSizeHook(mixture.batches, logger),
            evaluate,
            log,
            beat,
            divergence,
            *_device_hooks(start, device, logger),
            save,
        ],
        go_back=go_back,
    )
    if start.lease is not None:
        _announce(start, checked, trainer, logger, budget)
    return Session(trainer, mixture, logger, saver, guard, exported)


def _loader_factory(start: RunStart, checked: Checked, task: Task, device: Device) -> Callable[[RunState], Loader]:
    """A function that opens this rank's loader at the position of a run state."""

    def open_loader(state: RunState) -> Loader:
        return build_loader(
            checked.mixture,
            rank=start.world.rank,
            world_size=start.world.size,
            cursor=Cursor.from_dict(state.cursor),
            device=device,
            caches=CacheKeys(task.latents, task.states),
            sharing=Sharing(checked.batchings[0].workers, start.world.on_node),
        )

    return open_loader


def _device_hooks(start: RunStart, device: Device, logger: RunLogger) -> list[Hook]:
    """Hooks about the device that the recipe asks for: compiled code, profiling, the sync guard."""
    train, found = start.recipe.train, list[Hook]()
    if train.compile:
        file = start.run.compiled / f"gpu_{device.number:02d}.bin"
        found.append(CompiledHook(file, logger, writes=start.world.rank == device.number))
    if train.profile is not None and start.world.is_main:
        found.append(ProfileHook(train.profile, start.run.profile, logger, device))
    if train.sync_guard != "off":
        if device.is_gpu:
            found.append(SyncGuardHook(train.sync_guard, device))
        else:
            start.notes.append(f"train.sync_guard: {train.sync_guard} is of a GPU, and has no effect on a CPU")
    return found


def _announce(start: RunStart, checked: Checked, trainer: Trainer, logger: RunLogger, budget: ShutdownBudget) -> None:
    """Rank 0: write and print the description of this run."""
    r, world, task, mixture = start.recipe, start.world, trainer.task, checked.mixture
    cursor = Cursor.from_dict(trainer.state.cursor)
    use = cache_use(mixture, world_size=world.size, node=world.on_node, cursor=cursor)
    cache = [use.line(mixture.cache)] if use else []
    changed = {change.field: [change.old, change.new] for change in start.changes}
    start.run.describe(
        start.loaded.text,
        dump(r),
        sys.argv,
        step=trainer.state.step,
        processes=world.size,
        sources=task.sources,
        changed=changed,
    )
    parameters = sum(getattr(x, "ds_numel", x.numel()) for x in task.trained.parameters() if x.requires_grad)
    logger.info(
        f"{r.name}: {r.strategy.name} {r.train.precision} on {world.size} × {Device.current().name}, "
        f"global batch {described(r.train, checked.batchings)}, "
        f"{parameters / 1e6:.1f} M trained parameters, {r.train.steps} steps → {start.run.path}"
    )
    logger.note_changes(dict(changes_of(start.run)).get(trainer.state.step))
    if start.changes:
        logger.info("  the recipe differs from the last start's:")
    for change in start.changes:
        logger.info(f"    {change}")
    for note in [*mixture.notes, *cache, *task.notes, *start.notes, *budget.notes()]:
        logger.info(f"  {note}")
