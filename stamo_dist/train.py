"""The loop. Every stage, every strategy and every restart goes through `train`."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import closing
from pathlib import Path

import torch

from stamo_dist.data.loader import Batch, Cursor, build_loader, first_frames
from stamo_dist.data.mixture import Mixture
from stamo_dist.engine import checkpoint, strategy
from stamo_dist.engine.checkpoint import RunState
from stamo_dist.engine.ema import EMA
from stamo_dist.engine.metrics import MetricsFile, Reducer, StepSums, Stopwatch, WandB
from stamo_dist.engine.optim import adamw, lr_at
from stamo_dist.engine.pictures import save_grid
from stamo_dist.engine.preempt import EXIT_PREEMPTED, Stop
from stamo_dist.engine.processes import World, barrier, broadcast
from stamo_dist.engine.progress import TrainingProgress, duration
from stamo_dist.engine.runfolder import RunFolder, git_commit
from stamo_dist.errors import RecipeError
from stamo_dist.recipe.load import Loaded, dump
from stamo_dist.recipe.schema import Batching, batching
from stamo_dist.tasks import build_task
from stamo_dist.tasks.base import Task
from stamo_dist.tasks.noise import Noise

#: Dense bf16 peak in FLOP/s, by a part of the device's name; MFU is printed only where the peak is known.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
_EXPORT_BATCHES = 16


def train(loaded: Loaded, world: World, *, resume: str = "auto", allow_changed_data: bool = False) -> int:
    """Train the recipe to its end or until asked to stop; every process of the run calls it.

    `resume`: "auto" continues the newest whole checkpoint of the run folder, "none" insists on a fresh folder, anything
    else is the path of a checkpoint. Returns the exit code: 0 when finished, `EXIT_PREEMPTED` when it saved and left.

    Raises:
        StamoError: Recipe, data, run folder or checkpoint cannot be used as asked; nothing was trained.
    """
    recipe = loaded.recipe
    try:
        plan = batching(recipe.train, world.size)
    except ValueError as e:
        raise RecipeError([str(e)]) from None
    run = RunFolder(Path(recipe.run_dir))
    mixture = Mixture(recipe.data, seed=recipe.seed, global_batch=recipe.train.global_batch)
    if mixture.steps is not None and mixture.steps < recipe.train.steps:
        raise RecipeError([
            f"train.steps: {recipe.train.steps}, but data.sources.*.max_epochs lets the data end after {mixture.steps}"
        ])  # fmt: skip
    start: Path | None = None
    notes: list[str] = []
    if world.is_main:  # one process looks, so that all see the same
        run.prepare()
        lock = run.lock()
        start, notes = checkpoint.choose(run.checkpoints, resume, None if allow_changed_data else mixture.fingerprint)

    stop = Stop()
    torch.manual_seed(recipe.seed)  # every process builds the same initial weights
    task = build_task(recipe)
    if task.init_frames:
        task.initialise(first_frames(mixture, task.init_frames))
    engine = strategy.build(
        task.trained, adamw(task.trained, recipe.optimizer), recipe.strategy, world, plan,
        clip=recipe.optimizer.clip, precision=recipe.train.precision, block_classes=task.block_classes,
    )  # fmt: skip
    task.place(engine.device, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    ema = EMA(engine.unwrapped, recipe.train.ema) if recipe.train.ema else None

    start = broadcast(start)
    state = RunState(cursor=Cursor().to_dict(), samples=[0] * len(mixture.sources))
    if start is not None:
        state = checkpoint.load(start, engine, ema, precision=recipe.train.precision)
    if state.step >= recipe.train.steps and run.model.is_dir():
        if world.is_main:
            print(f"{run.path}: already trained to step {state.step}")
        return 0
    session = _Session(loaded, run, mixture, task, engine, ema, plan, state)
    if world.is_main:
        session.open([*notes, *([f"continuing {start} after step {state.step}"] if start else [])])
    barrier()
    try:
        code = session.run(stop)
    finally:
        session.close()
    if code == 0:
        session.export()
    if world.is_main:
        lock.close()
    return code


class _Session:
    """One start of the run, from `state` to the end or to the next stop."""

    def __init__(
        self, loaded: Loaded, run: RunFolder, mixture: Mixture, task: Task, engine: strategy.Engine, ema: EMA | None,
        plan: Batching, state: RunState,
    ):  # fmt: skip
        self.loaded, self.recipe, self.run_folder, self.mixture = loaded, loaded.recipe, run, mixture
        self.task, self.engine, self.ema, self.plan, self.state = task, engine, ema, plan, state
        self.main = engine.world.is_main
        self.reducer = Reducer(engine.device)
        self.file: MetricsFile | None = None
        self.wandb: WandB | None = None
        self.commit = git_commit()
        self.flops = task.flops_per_sample() if engine.device.type == "cuda" else None
        self.progress = TrainingProgress(self.recipe.train.steps, state.step, shown=self.main)

    def open(self, notes: list[str]) -> None:
        """Rank 0: write what this run is and say it."""
        self.run_folder.describe(
            self.loaded.text,
            dump(self.loaded.recipe),
            sys.argv,
            step=self.state.step,
            processes=self.plan.world_size,
        )
        self.file = MetricsFile(self.run_folder.metrics, self.state.step)
        self.wandb = WandB(self.recipe, self.run_folder.path, self.loaded.resolved)
        r, p = self.recipe, self.plan
        parameters = sum(x.numel() for x in self.task.trained.parameters())
        self.progress.say(
            f"{r.name}: {r.strategy.name} {r.train.precision} on {p.world_size} × {self.engine.device.type}, "
            f"global batch {r.train.global_batch} = {p.world_size} × {p.accumulation} × {p.micro_batch}, "
            f"{parameters / 1e6:.1f} M trained parameters per process, {r.train.steps} steps → {self.run_folder.path}"
        )
        for note in [*self.task.notes, *notes]:
            self.progress.say(f"  {note}")

    def run(self, stop: Stop) -> int:
        recipe, engine, state = self.recipe, self.engine, self.state
        noise = Noise(recipe.seed)
        loader = build_loader(
            self.mixture, rank=engine.world.rank, world_size=engine.world.size,
            cursor=Cursor.from_dict(state.cursor), pin_memory=engine.device.type == "cuda", latents=self.task.latents,
        )  # fmt: skip
        watch = Stopwatch()
        with closing(loader):
            batches = iter(loader)
            while state.step < recipe.train.steps:
                waiting = time.perf_counter()
                batch = next(batches)
                watch.waited += time.perf_counter() - waiting
                step = state.step + 1
                if step == 1 and self.main:
                    self._show_first(batch)
                engine.set_lr(lr_at(step, recipe.train.steps, recipe.optimizer), step)
                sums = StepSums.empty(self.task.terms, len(self.mixture.sources), engine.device)
                for micro in batch.to(engine.device).split(self.plan.micro_batch):
                    with engine.accumulate():
                        out = self.task.loss(engine.module, micro, noise.at(step))
                        sums.add(out.per_sample, micro.source)
                        grad_norm = engine.backward(out.loss)
                assert grad_norm is not None, "the last micro-batch of a step must step the optimizer"
                if self.ema is not None:
                    self.ema.update(step)
                stopping = self._log()  # the step before this one, which the device has finished
                state.step, state.cursor = step, batch.cursor.to_dict()
                self.reducer.put(step, sums, grad_norm, stop.asked, watch.lap(), batch.skipped)
                if stopping or step % recipe.train.checkpoint.every == 0 or step == recipe.train.steps:
                    stopping = self._log() or stopping
                    self._save()
                    watch.reset()
                if stopping and step < recipe.train.steps:
                    if stop.asked:
                        print(f"rank {engine.world.rank}: {stop.signal}: saved step {step} and leaving", flush=True)
                    return EXIT_PREEMPTED
        return 0

    def _log(self) -> bool:
        """Write the finished step's metrics; True when any rank was asked to stop."""
        reduced = self.reducer.take()
        if reduced is None:
            return False
        self.state.seconds += reduced.seconds
        self.state.samples = [a + b for a, b in zip(self.state.samples, reduced.counts, strict=True)]
        recipe = self.recipe
        rate = recipe.train.global_batch / reduced.seconds
        mfu = self._mfu(rate)
        if self.main and reduced.step % recipe.train.log_every == 0:
            line = {
                "step": reduced.step,
                **reduced.losses,
                "grad_norm": reduced.grad_norm,
                "lr": lr_at(reduced.step, recipe.train.steps, recipe.optimizer),
                "samples_per_second": round(rate, 3),
                "data_wait": round(reduced.data_wait, 4),
                "seconds": round(self.state.seconds, 3),
                **({"mfu": round(mfu, 4)} if mfu is not None else {}),
                **{
                    f"{self.task.terms[0]}/{name}": value
                    for name, value in zip(self.mixture.sources, reduced.per_source, strict=True)
                    if value is not None
                },
                **{f"samples/{name}": n for name, n in zip(self.mixture.sources, reduced.counts, strict=True) if n},
                **({"skipped": reduced.skipped} if reduced.skipped else {}),
            }
            assert self.file is not None
            self.file.write(line)
            if self.wandb is not None:
                self.wandb.log(line)
        self.progress.update(reduced.step, reduced.losses[self.task.terms[0]], rate, reduced.data_wait, mfu)
        return reduced.stop

    def _mfu(self, samples_per_second: float) -> float | None:
        if self.flops is None:
            return None
        name = torch.cuda.get_device_name()
        peak = next((p for part, p in PEAK_FLOPS.items() if part in name), None)
        return None if peak is None else samples_per_second * self.flops / (peak * self.engine.world.size)

    def _save(self) -> None:
        if self.file is not None:
            self.file.sync()
        began = time.perf_counter()
        path = checkpoint.save(
            self.run_folder.checkpoints, self.engine, self.ema, self.state, fingerprint=self.mixture.fingerprint,
            precision=self.recipe.train.precision, keep=self.recipe.train.checkpoint.keep, git_commit=self.commit,
        )  # fmt: skip
        self.progress.say(f"saved {path} in {duration(time.perf_counter() - began)}")

    def _show_first(self, batch: Batch) -> None:
        picture = self.run_folder.path / "first_batch.png"
        save_grid(picture, batch.images[:32], [self.mixture.sources[s] for s in batch.source[:32].tolist()])
        if self.wandb is not None:
            self.wandb.picture("first_batch", picture, 1)

    def export(self) -> None:
        """Rank 0: the usable model, from the checkpoint just written."""
        if self.main:
            weights = checkpoint.read_weights(checkpoint.folder_of(self.run_folder.checkpoints, self.state.step))
            loader = build_loader(
                self.mixture,
                rank=0,
                world_size=1,
                cursor=Cursor(),
                pin_memory=False,
                workers=0,
                latents=self.task.latents,
            )
            with closing(loader):
                batches = iter(loader)
                # A fresh model: the trained one is spread over the processes.
                whole = build_task(self.recipe)
                part = self.run_folder.path / ".model.tmp"
                shutil.rmtree(part, ignore_errors=True)
                whole.export(part, weights, (next(batches) for _ in range(_EXPORT_BATCHES)))
            shutil.rmtree(self.run_folder.model, ignore_errors=True)
            part.rename(self.run_folder.model)
            print(f"exported {self.run_folder.model}", flush=True)
        barrier()

    def close(self) -> None:
        self.progress.close()
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
