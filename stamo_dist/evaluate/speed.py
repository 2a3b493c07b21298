"""How many frames a second become states, and states become frames; warm, median and spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from stamo_dist.errors import RunError
from stamo_dist.evaluate.measurement import Measurement, TokenizerMeasurement
from stamo_dist.evaluate.options import SpeedOptions
from stamo_dist.evaluate.result import EvaluationResult
from stamo_dist.recipe.load import load
from stamo_dist.run.folder import RunFolder

WARM = 3  # calls that are not counted


def speed(**options: Any) -> Measurement:
    """Of the tokenizer or the policy that the options name."""
    from stamo_dist.evaluate.policy_speed import PolicySpeed

    path = options["run"]
    resolved = RunFolder(path).resolved
    is_policy = path.is_file() or (resolved.is_file() and load(resolved).recipe.stage == "policy")
    return (PolicySpeed if is_policy else TokenizerSpeed)(**options)


class SpeedMeasurement(SpeedOptions, Measurement):
    """What the two have in common."""

    name = "speed"
    by = ("device", "part", "batch")
    better: ClassVar = {"hz": "higher"}

    def devices(self) -> list[str]:
        """Raises: RunError: One that was asked for is not there."""
        there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        if missing := set(self.device or ()) - set(there):
            raise RunError(f"--device {', '.join(sorted(missing))}: this machine has {', '.join(there)}")
        return self.device or there


def speed_columns(what: str) -> dict[str, str]:
    columns = {"device": "device", "part": "part", "batch": f"{what} at once", "hz": f"{what}/s"}
    return {**columns, "low": "10 %", "high": "90 %", "ms": "ms a call"}


def timed(call: Callable[[], Any], cuda: bool) -> float:
    """Seconds of one call, which is waited for."""
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speed_row(device: str, part: str, batch: int, seconds: Tensor) -> dict[str, Any]:
    """A row of the table from the seconds of each call, (calls,)."""
    median = seconds.median().item()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)",
        "part": part,
        "batch": batch,
        "hz": batch / median,
        "low": batch / seconds.quantile(0.9).item(),
        "high": batch / seconds.quantile(0.1).item(),
        "ms": 1000 * median,
    }


class TokenizerSpeed(SpeedMeasurement, TokenizerMeasurement):
    title = "Speed of the tokenizer"
    about = (
        "fp32, frames already decoded and on the device; each call is waited for. Median over the calls after "
        f"{WARM} that are not counted; a tenth of the calls was slower than 10 %, and a tenth faster than 90 %. "
        "encoder: up to its patch tokens; state: encoder and compressor; decode: the sampler and the VAE."
    )
    columns: ClassVar = speed_columns("frames")

    def select(self) -> None:
        self._devices, self._batches = self.devices(), list(self.batch or (1, 16))

    def settings(self) -> dict[str, Any]:
        size = self.recipe.data.image_size
        return {"batches": self._batches, "calls": self.calls, "steps": self.sampler_steps, "image_size": size}

    def results(self) -> Iterator[EvaluationResult]:
        total = len(self._devices) * len(self._batches) * 3 * (self.calls + WARM)
        watched, rows = self.bar.add_task("calls", total=total), []
        for device in self._devices:
            self.tokenizer.to(device)
            for batch in self._batches:
                for part, call in self._parts(device, batch).items():
                    seconds = []
                    for _ in range(WARM + self.calls):
                        seconds.append(timed(call, device == "cuda"))
                        self.bar.advance(watched)
                    rows.append(speed_row(device, part, batch, torch.tensor(seconds[WARM:], dtype=torch.float64)))
        yield self.result(rows)

    def _parts(self, device: str, batch: int) -> dict[str, Callable[[], Tensor]]:
        tokenizer, steps, size = self.tokenizer, self.sampler_steps, self.recipe.data.image_size
        images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8, device=device)
        tokens = tokenizer.encode(images)
        return {
            "encoder": torch.no_grad()(lambda: tokenizer.encoder(images)),
            "state": lambda: tokenizer.encode(images),
            f"decode, {steps} steps": lambda: tokenizer.decode(tokens, steps),
        }
