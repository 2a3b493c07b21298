"""Steps of a tokenizer to the same held-out loss: from scratch, and from the scale before (`init_from`). A toy.

The four scales of the paper, S → S+D → S+D+O → +Ego, as drawn films. Every scale is trained from scratch for
`--steps`, and once more for `--share` of them as a chain: from the last weights of the warm run before (S+D from S's).
Printed are the steps after which the warm run's held-out loss is the one that the run from scratch ends with.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import toy  # noqa: E402

from tests.warm import Warm  # noqa: E402

SOURCES = ("sim", "droid", "oxe", "ego")
SCALES = {"S": 1, "S+D": 2, "S+D+O": 3, "+Ego": 4}
Found = tuple[float, int | None, float]
FRAMES, DRAWS, SIDE = 128, 4, 32
RECIPE = """\
name: {name}
run_dir: {run}
seed: {seed}
data:
  image_size: 32
  workers: 0
  sources:
{sources}
model:
  encoder:
    image_size: 32
    train: true
    config: {{patch_size: 8, hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 2}}
  compressor: {{tokens: 2, dim: 16, width: 48, depth: 1, heads: 4, standardise: 256, noise: 0.1}}
  decoder:
    precondition: true
    config: {{patch_size: 1, num_layers: 2, num_attention_heads: 2, attention_head_dim: 24}}
  vae: {{weights: {vae}}}
flow: {{mean: 1.0}}
train:
  steps: {steps}
  global_batch: 8
  micro_batch: 8
  precision: fp32
  ema: 0.98
  log_every: 50
  dry_export: false
  checkpoint: {{every: {every}, keep: 1, keep_every: {every}}}
optimizer: {{lr: 1e-3, warmup_steps: 20, schedule: constant}}
strategy: {{name: ddp}}
"""


def frame(kind: str, episode: int, t: int, size: int) -> np.ndarray:
    """A thing that moves over a ground; both look different in every kind of film."""
    draw = np.random.default_rng([SOURCES.index(kind), episode])
    low, high = draw.integers(20, 110, 3), draw.integers(140, 240, 3)
    y, x = np.mgrid[:size, :size] / size
    ground = {
        "sim": np.zeros((size, size)),
        "droid": x * 0.6 + y * 0.4,
        "oxe": np.sin(12 * (x + draw.random())) > 0,
        "ego": np.sin(9 * x + 5 * draw.random()) * np.cos(7 * y + 5 * draw.random()) * 0.5 + 0.5,
    }[kind]
    at = (draw.random(2) + np.array([0.05, 0.03]) * t * draw.choice([-1, 1], 2)) % 1
    away = [np.abs(axis - place) for axis, place in zip((x, y), at, strict=True)]
    distance = np.maximum(*away) if kind in ("sim", "oxe") else np.hypot(*away)
    picture = low + (high - low) * np.asarray(ground, float)[..., None] * 0.6
    picture[distance < 0.16] = high if kind in ("sim", "droid") else 255 - high
    return picture.clip(0, 255).astype(np.uint8)


def make_sources(root: Path) -> None:
    drawn: Callable[..., np.ndarray] = toy.toy_frame
    for kind in SOURCES:
        toy.toy_frame = lambda episode, t, size, kind=kind: frame(kind, episode, t, size)
        toy.make_source(root, kind, episodes=24, length=16, shard_bytes=1 << 22)
    toy.toy_frame = drawn


def train(warm: Warm, recipe: Path, *settings: str) -> None:
    done = warm.run("train", recipe, *settings, timeout=3600)
    if done.returncode:
        sys.exit(f"{recipe}: exited {done.returncode}\n{done.stdout}\n{done.stderr}")


def write_recipe(folder: Path, name: str, count: int, seed: int, steps: int, args: argparse.Namespace) -> Path:
    folder.mkdir(parents=True)
    sources = "\n".join(f"    {kind}: {{path: {args.data}/{kind}}}" for kind in SOURCES[:count])
    values = {"steps": steps, "every": args.every, "vae": args.data / "vae", "sources": sources}
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(name=name, run=folder / "run", seed=seed, **values))
    return path


def held_out(recipe_path: Path) -> dict[int, float]:
    """Step → loss of the averaged weights on the held-out frames of the recipe's sources, on the same noise for all."""
    import torch

    import stamo_dist.models  # noqa: F401  # isort: skip  must precede diffusers
    from stamo_dist.checkpoint.load import read_weights
    from stamo_dist.models import flow
    from stamo_dist.recipe.load import load
    from stamo_dist.tasks.noise import StepNoise
    from stamo_dist.tasks.tokenizer import TokenizerTask

    recipe = load(recipe_path).recipe
    count = len(recipe.data.used)
    frames = [
        frame(kind, sum(map(ord, kind)) + 100 + e % 24, e // 24, SIDE)
        for kind in SOURCES[:count]
        for e in range(FRAMES // count)
    ]
    images, task = torch.from_numpy(np.stack(frames)), TokenizerTask(recipe)
    samples, losses = torch.arange(len(images)), dict[int, float]()
    for path in sorted(Path(recipe.run_dir).glob("checkpoints/step_*")):
        task.trained.load_state_dict(read_weights(path))
        found = []
        with torch.no_grad():
            z0 = task.tokenizer.latents(images)
            for k in range(DRAWS):
                noise = StepNoise(0, k)
                sigma = flow.sigma(noise.uniform(samples, 0), recipe.flow)
                epsilon = noise.normal(samples, z0.shape[1:], 1)
                velocity = task.trained(images, flow.interpolate(z0, epsilon, sigma), sigma, None)[0]
                found.append(float((velocity - (epsilon - z0)).square().mean()))
        losses[int(path.name.removeprefix("step_"))] = statistics.fmean(found)
    return losses


def one_seed(
    seed: int, args: argparse.Namespace, out: Path, server: Warm
) -> dict[str, tuple[float, int | None, float]]:
    """Scale → (last loss from scratch, warm start's steps to it, warm start's last loss)."""
    found: dict[str, Found] = {}
    before, fewer = None, round(args.share * args.steps)
    for name, count in SCALES.items():
        scratch = write_recipe(out / f"{seed}_{count}_scratch", f"{name} from scratch", count, seed, args.steps, args)
        train(server, scratch)
        if before is None:
            before = scratch.parent / "run"
            continue
        warm = write_recipe(out / f"{seed}_{count}_warm", f"{name} warm", count, seed, fewer, args)
        train(server, warm, "--set", f"init_from={before}")
        goal, losses = held_out(scratch)[args.steps], held_out(warm)
        reached = next((step for step, loss in losses.items() if loss <= goal), None)
        found[name] = (goal, reached, losses[fewer])
        print(f"seed {seed}, {name}: from scratch {goal:.4f} at {args.steps}, warm {reached}", file=sys.stderr)
        before = warm.parent / "run"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more are slower at this size
    with tempfile.TemporaryDirectory() as folder:
        args.data = Path(folder) / "shards"
        make_sources(args.data)
        toy.make_vae(args.data / "vae")
        server = Warm(Path(folder), os.environ)
        runs = [one_seed(seed, args, Path(folder), server) for seed in range(args.seeds)]
        server.close()
    print(
        f"| scale | held-out loss from scratch, {args.steps} steps | warm start reaches it after | share | its loss |"
    )
    print("|---|---|---|---|---|")
    for name in list(SCALES)[1:]:
        goals, reached, last = zip(*(run[name] for run in runs), strict=True)
        steps = [f"{step}" if step else "never" for step in reached]
        known = [step for step in reached if step is not None]
        share = f"{statistics.fmean(known) / args.steps:.0%}" if len(known) == len(runs) else "–"
        goal, end = statistics.fmean(goals), statistics.fmean(last)
        print(f"| {name} | {goal:.4f} | {', '.join(steps)} | {share} | {end:.4f} |")


if __name__ == "__main__":
    main()
