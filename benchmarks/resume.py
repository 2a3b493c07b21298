"""Seconds from the start of the process to its first resumed optimizer step, and where they go.

python benchmarks/resume.py [--samples 1e5 1e6 1e7 1e8] [--strategy ddp] [--repeats 3]

`stamo train` goes on in the middle of an epoch, each time in a new process, with a clock around its parts. The samples
are on disk: one shard of 4096 small frames under as many names as it takes. The peer is what accelerate offers for a
map-style dataset, `skip_first_batches`, over sample numbers alone: nothing is read. The limit is streaming's shuffle of
the one group of samples that the position falls into.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PER_SHARD, SIZE, BATCH = 4096, 32, 32
PARTS = ("imports", "model", "checkpoint", "index", "position", "rest", "step")
RECIPE = """\
name: resume
run_dir: {run}
data:
  image_size: 32
  sources: {{a: {{path: {source}}}}}
model:
  encoder: {{image_size: 56, train: true, config: {{hidden_size: 192, num_hidden_layers: 4, num_attention_heads: 3}}}}
  compressor: {{tokens: 2, dim: 256, width: 256, depth: 2, heads: 4}}
  decoder: {{config: {{patch_size: 1, num_layers: 4, num_attention_heads: 4, attention_head_dim: 64}}}}
  vae: {{weights: {vae}}}
train: {{steps: 1000, global_batch: 32, micro_batch: 32, precision: fp32}}
strategy: {{name: {strategy}}}
"""


class Clock:
    """Seconds of each part; of parts within parts, the inner one counts."""

    def __init__(self, began: float):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since = "imports", began

    def enter(self, part: str) -> str:
        """Count for `part` from now on; returns the part before."""
        now, before = time.time(), self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.enter(before)

        return timed


def child(recipe: str, began: float) -> None:
    """`stamo train RECIPE` up to the end of its first step, then the seconds as JSON."""
    gc.disable()  # as the command does while it imports
    from stamo_dist import cli
    from stamo_dist.data import loader
    from stamo_dist.distributed.engine import Engine
    from stamo_dist.distributed.strategies import EngineSpec
    from stamo_dist.tasks import tokenizer
    from stamo_dist.training import setup

    clock = Clock(began)
    clock.enter("rest")
    for part, owner, names in (
        ("model", setup, ("build_task",)),
        ("model", tokenizer.TokenizerTask, ("initialise", "place")),
        ("model", EngineSpec, ("connect", "build")),
        ("checkpoint", setup, ("select_checkpoint", "verify_or_fall_back", "load_checkpoint")),
        ("index", setup, ("Mixture", "run_fingerprint")),
        ("position", setup, ("first_frames", "build_loader")),
        ("position", loader.Loader, ("__next__",)),
        ("step", tokenizer.TokenizerTask, ("loss",)),
    ):
        for name in names:
            setattr(owner, name, clock.around(part, getattr(owner, name)))
    backward = clock.around("step", Engine.backward)

    def last(*args: Any) -> None:
        if backward(*args) is not None:
            print("\n" + json.dumps(clock.seconds), flush=True)
            os._exit(0)

    Engine.backward = last  # type: ignore[method-assign, assignment]
    sys.argv = ["stamo", "train", recipe, "--allow-changed-data"]
    cli.main()


def make_source(folder: Path, samples: int, shard: Path | None) -> Path:
    """A source of about so many samples; its shards are hard links to one. Returns that one."""
    import simplejpeg

    from stamo_dist import _streaming  # noqa: F401
    from stamo_dist.data.schema import MANIFEST, Manifest, Split, columns

    if shard is None:
        from streaming.base.format import MDSWriter

        rng, first = np.random.default_rng(0), folder.parent / "first"
        layout = columns(action=0, original_action=0, proprio=0)
        frame = np.broadcast_to(rng.integers(0, 255, (SIZE, SIZE, 1), np.uint8), (SIZE, SIZE, 3)).copy()
        with MDSWriter(out=str(first), columns=layout, size_limit=None) as writer:
            for t in range(PER_SHARD):
                frame[t // 128 % SIZE, t % SIZE] ^= 255
                text = dict.fromkeys(("instruction", "source", "camera", "convention"), "")
                jpeg = simplejpeg.encode_jpeg(frame)
                writer.write({"image": jpeg, "episode": "e", "t": t, "length": PER_SHARD, "time": t / 10, **text})
        shard = first / "shard.00000.mds"
    index = json.loads((shard.parent / "index.json").read_text())
    entry, camera = index["shards"][0], folder / "train" / "front"
    camera.mkdir(parents=True)
    count = max(1, samples // PER_SHARD)
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    shards, checksums = [], {}
    for i in range(count):
        name = f"shard.{i:05d}.mds"
        os.link(shard, camera / name)
        checksums[f"train/front/{name}"] = digest
        shards.append({**entry, "raw_data": {**entry["raw_data"], "basename": name}})
    (camera / "index.json").write_text(json.dumps({**index, "shards": shards}))
    (folder / "train" / "episodes.jsonl").touch()
    manifest = Manifest(
        name="a", source_format="made", image_size=SIZE, cameras=["front"], rate_hz=10, action_dim=0, proprio_dim=0,
        convention="none", splits={"train": Split(episodes=count, frames=count * PER_SHARD)},
        checksums=checksums,
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return shard


def make_vae(folder: Path) -> Path:
    import stamo_dist.models  # noqa: F401  # isort: skip  must precede diffusers
    from diffusers import AutoencoderKL

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32), layers_per_block=1, latent_channels=8, sample_size=SIZE,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def move(run: Path, cursor: int) -> None:
    """Let the run's checkpoint stand at another place of the data."""
    from stamo_dist.checkpoint.manifest import MANIFEST, read_checkpoint_manifest

    path = run / "checkpoints" / "step_00000001"
    marker = read_checkpoint_manifest(path)
    marker.state.cursor = {"samples": cursor}
    (path / MANIFEST).write_text(marker.text())


def resumed(recipe: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(recipe), str(time.time())]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        sys.exit(out.stdout + out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def shuffle_alone(samples: int) -> float:
    from stamo_dist.data.group_order import GROUP
    from streaming.base.shuffle import get_shuffle  # isort: skip

    counts = np.full(min(samples, GROUP) // PER_SHARD, PER_SHARD, np.int64)
    began = time.perf_counter()
    get_shuffle("py1e", counts, 1, 0, 0, 1 << 18)
    return time.perf_counter() - began


def accelerate_skips(samples: int) -> float:
    """accelerate's way to the middle of an epoch of numbers, up to the first batch."""
    from accelerate import skip_first_batches
    from torch.utils.data import DataLoader

    loader = DataLoader(range(samples), batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]
    began = time.perf_counter()
    next(iter(skip_first_batches(loader, samples // 2 // BATCH)))
    return time.perf_counter() - began


def rows(options: argparse.Namespace, folder: Path) -> Iterator[tuple[int, dict[str, float], float, float | None]]:
    """Samples, our seconds of each part, the shuffle's and accelerate's."""
    shard, vae = None, make_vae(folder / "vae")
    recipe, run = folder / "recipe.yaml", folder / "run"
    for samples in map(int, options.samples):
        source = folder / f"{samples}"
        shard = make_source(source, samples, shard)
        recipe.write_text(RECIPE.format(run=run, source=source, vae=vae, strategy=options.strategy))
        if not run.exists():
            command = [sys.executable, "-m", "stamo_dist.cli", "train", str(recipe), "--set", "train.steps=1"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        move(run, samples // 2 // BATCH * BATCH)
        times = [resumed(recipe) for _ in range(options.repeats)]
        middle = {part: statistics.median(t[part] for t in times) for part in PARTS}
        middle["total"] = statistics.median(sum(t.values()) for t in times)
        yield samples, middle, shuffle_alone(samples), accelerate_skips(samples) if samples <= options.skip else None


def main() -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, nargs="+", default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", type=float, default=1e7, help="most samples for accelerate, which lists them all")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title=f"from process start to the first resumed step, {options.strategy}, seconds")
    heads = ("samples", "imports", "model", "checkpoint", "data: index", "data: position, first batch", "rest", "step")
    for column in (*heads, "total", "the shuffle alone", "accelerate skips"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        found = rows(options, Path(folder))
        for samples, ours, shuffle, skip in track(
            found, "resuming", total=len(options.samples), console=Console(stderr=True)
        ):
            values = [ours[part] for part in (*PARTS, "total")]
            table.add_row(
                f"{samples:.0e}", *(f"{v:.2f}" for v in (*values, shuffle)), "–" if skip is None else f"{skip:.2f}"
            )
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], float(sys.argv[3]))
    else:
        main()
