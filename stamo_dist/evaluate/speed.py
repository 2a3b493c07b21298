"""How many frames a second become states, and states become frames; warm, median and spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from stamo_dist.errors import RunError
from stamo_dist.evaluate.common import Result, load_tokenizer, output_folder, progress, read_recipe
from stamo_dist.run.folder import open_run

NAME = "speed"
_WARM = 3
_COLUMNS = {
    "device": "device",
    "part": "part",
    "batch": "frames at once",
    "hz": "frames/s",
    "low": "10 %",
    "high": "90 %",
    "ms": "ms a call",
}
_ABOUT = (
    "fp32, frames already decoded and on the device; each call is waited for. Median over the calls after "
    f"{_WARM} that are not counted; a tenth of the calls was slower than 10 %, and a tenth faster than 90 %. "
    "encoder: up to its patch tokens; state: encoder and compressor; decode: the sampler and the VAE."
)


def speed(
    run_path: Path,
    *,
    checkpoint: str | None = None,
    batches: Sequence[int] = (1, 16),
    calls: int = 30,
    steps: int | None = None,
    devices: Sequence[str] | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> Result:
    """Time a run's tokenizer on every device of this machine and write RUN/eval/speed/.

    `batches`: frames at once. `calls`: timed, of each. `steps`: of the sampler, the recipe's when omitted. `devices`:
    "cpu", "cuda"; all there are when omitted.

    Raises:
        StamoError: No such run, no checkpoint yet, or a device that is not there; nothing was written.
    """
    console = console or Console()
    run = open_run(run_path)
    recipe = read_recipe(run)
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = list(devices or there)
    if missing := set(devices) - set(there):
        raise RunError(f"--device {', '.join(sorted(missing))}: this machine has {', '.join(there)}")
    tokenizer, provenance = load_tokenizer(run, recipe, checkpoint)
    folder = output_folder(run, NAME, out)
    steps = steps or recipe.flow.sampler_steps
    size, rows = recipe.data.image_size, []
    with progress(console) as bar:
        watched = bar.add_task("calls", total=len(devices) * len(batches) * 3 * (calls + _WARM))
        for device in devices:
            tokenizer.to(device)
            name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
            for batch in batches:
                images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8, device=device)
                tokens = tokenizer.encode(images)
                parts: dict[str, Callable[[], Tensor]] = {
                    "encoder": lambda: tokenizer.encoder(images),  # noqa: B023
                    "state": lambda: tokenizer.encode(images),  # noqa: B023
                    f"decode, {steps} steps": lambda: tokenizer.decode(tokens, steps),  # noqa: B023
                }
                for part, call in parts.items():
                    seconds = _time(call, calls, lambda: bar.advance(watched))
                    rows.append(_row(name, part, batch, seconds))
    settings = {"batches": list(batches), "calls": calls, "steps": steps, "image_size": size}
    result = Result(
        NAME, "Speed of the tokenizer", _ABOUT, _COLUMNS, rows, settings, provenance,
        by=["device", "part", "batch"], better={"hz": "higher"},
    )  # fmt: skip
    result.write(folder)
    result.show(console, folder)
    return result


@torch.no_grad()
def _time(call: Callable[[], Tensor], calls: int, advance: Callable[[], None]) -> Tensor:
    """Seconds of each timed call, (calls,)."""
    seconds = []
    for _ in range(_WARM + calls):
        start = time.perf_counter()
        if call().is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        advance()
    return torch.tensor(seconds[_WARM:], dtype=torch.float64)


def _row(device: str, part: str, batch: int, seconds: Tensor) -> dict[str, Any]:
    median = seconds.median().item()
    return {
        "device": device, "part": part, "batch": batch, "hz": batch / median,
        "low": batch / seconds.quantile(0.9).item(), "high": batch / seconds.quantile(0.1).item(), "ms": 1000 * median,
    }  # fmt: skip
