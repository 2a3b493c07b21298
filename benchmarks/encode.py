"""Frames/s of `stamo encode` beside its model alone on frames that are ready, and how far bf16 and TF32 are from fp32.

    python benchmarks/encode.py [--frames 4000] [--size 256] [--batch 96] [--turns 3] [--compile] [--tiny]

Frames and weights are made on the spot. A tokenizer's VAE writes latents, a policy's tokenizer writes states: at full
size SD3's VAE and DINOv2-L with the compressor, with --tiny toys. The model alone is the limit; its batches lie on the
device, and nothing is read, fetched or written. Medians of the turns.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _beside import beside
from _toy import jpegs
from frames import write_mds
from rich.console import Console
from rich.table import Table
from step import FULL, TINY

import stamo_dist.models  # noqa: F401  # isort: skip  must precede diffusers
from diffusers import AutoencoderKL

from stamo_dist.device import Device
from stamo_dist.distributed.collectives import leave
from stamo_dist.distributed.rank import World
from stamo_dist.encode import encoders
from stamo_dist.encode.run import encode
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe.schema import Recipe

_ALONE = World(0, 1, 0, 1)


def recipes(root: Path, sizes: dict[str, Any], size: int, batch: int) -> dict[str, Recipe]:
    """One whose VAE, and one whose tokenizer is cached; their weights are random and written below `root`."""
    torch.manual_seed(0)
    AutoencoderKL(**sizes["vae"]).save_pretrained(root / "vae")
    model = {
        "encoder": {"config": sizes["dino"], "image_size": sizes["seen"], "train": True},
        "compressor": sizes["compressor"], "decoder": {"config": TINY["dit"] | {"in_channels": 16, "out_channels": 16}},
        "vae": {"weights": str(root / "vae")},
    }  # fmt: skip
    common = {
        "name": "encode", "data": {"sources": {"s": {"path": str(root / "frames")}}, "image_size": size},
        "train": {"steps": 1, "global_batch": batch, "micro_batch": batch},
    }  # fmt: skip
    latents = Recipe.model_validate({**common, "model": model})
    tokenizer = Tokenizer.from_config(latents.model, latents.flow, size)
    tokenizer.save_pretrained(root / "tokenizer")
    policy = {"vision": "fused", "tokenizer": str(root / "tokenizer")}
    data = {**common["data"], "horizon": 1}
    return {
        "latents": latents,
        "states": Recipe.model_validate({**common, "data": data, "stage": "policy", "policy": policy}),
    }


def alone(recipe: Recipe, arithmetic: str, frames: int, compiled: bool) -> Callable[[], float]:
    """Frames/s of the model, warm, over as many frames."""
    device, batch = Device.current(), recipe.train.micro_batch
    encoder = encoders.build(recipe, device)
    images = torch.randint(256, (batch, *[recipe.data.image_size] * 2, 3), dtype=torch.uint8)
    there = device.upload(images)
    encoders.lowered(encoder, encoders.arithmetic_of(arithmetic, encoder, device), device, there)
    run = encoders.function(encoder, compiled=compiled, batch=batch)

    @torch.no_grad()
    def rate() -> float:
        start = time.perf_counter()
        for _ in range(frames // batch):
            run(there)
        device.synchronize()
        return batch * (frames // batch) / (time.perf_counter() - start)

    rate()
    return rate


def whole(recipe: Recipe, arithmetic: str, kind: str, frames: int, compiled: bool) -> tuple[float, float | None]:
    """Frames/s after the first batch, to the last row on disk; and the error."""
    for folder in Path(recipe.data.sources["s"].path).rglob(f"{kind}-*"):
        shutil.rmtree(folder)
    done = encode(recipe, _ALONE, arithmetic, compiled=compiled)
    return (frames - recipe.train.micro_batch) / done.seconds, done.error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--arithmetic", nargs="+", choices=encoders.ARITHMETIC)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    o = parser.parse_args()
    sizes, device = dict(TINY if o.tiny else FULL), Device.current()
    if o.tiny:
        o.frames, o.batch, o.turns = min(o.frames, 256), min(o.batch, 16), min(o.turns, 1)
        sizes["vae"] = {**sizes["vae"], "latent_channels": 16}
    size = o.size or sizes["size"]
    arithmetics = o.arithmetic or (["fp32", "tf32", "bf16"] if device.is_gpu else ["fp32", "bf16"])
    table = Table(title=f"frames/s, {size} px, batches of {o.batch}, {device.name}")
    for column in ("rows", "arithmetic", "from fp32", "model alone", "stamo encode", "of it"):
        table.add_column(column, justify="left" if column in ("rows", "arithmetic") else "right")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_mds(root / "frames", jpegs(o.frames, size), size)
        for kind, recipe in recipes(root, sizes, size, o.batch).items():
            for arithmetic in arithmetics:
                limit = alone(recipe, arithmetic, o.frames, o.compile)
                turns = [(limit(), *whole(recipe, arithmetic, kind, o.frames, o.compile)) for _ in range(o.turns)]
                model, ours = (statistics.median(turn[i] for turn in turns) for i in (0, 1))
                share, error = statistics.median(turn[1] / turn[0] for turn in turns), turns[0][2]
                said = "–" if error is None else f"{error:.1e}"
                table.add_row(kind, arithmetic, said, f"{model:,.1f}", f"{ours:,.1f}", f"{share:.2f}")
                beside(f"encode {kind}, {arithmetic}", ours, model, "frames/s", other="model alone")
                if error is not None:
                    beside(f"encode {kind}, {arithmetic}: error beside fp32", error, None, "of a row's size")
    Console(width=120).print(table)
    leave(0)


if __name__ == "__main__":
    main()
