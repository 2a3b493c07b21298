"""Speed of a tokenizer's encoding and decoding, and of a policy's acting (timesteps per second); warm, median, spread.

For a policy also the cost of the world head: none, StaMo's, raw DINOv2's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.progress import TaskID
from torch import Tensor

from stamo_dist.device import Device
from stamo_dist.errors import RunError
from stamo_dist.evaluate.measurement import Measurement, TokenizerMeasurement
from stamo_dist.evaluate.options import SpeedOptions
from stamo_dist.evaluate.result import EvaluationResult, Provenance, output_folder
from stamo_dist.evaluate.weights import exported_at, open_policy
from stamo_dist.models.openvla import load as loading
from stamo_dist.models.openvla.actions import Statistics
from stamo_dist.models.openvla.heads import WorldHead
from stamo_dist.models.openvla.images import ImageProcessor
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.openvla.policy_network import PolicyNetwork, PolicySizes
from stamo_dist.models.openvla.stamo import StamoVision
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.models.policies import AnyPolicy
from stamo_dist.models.state_encoder import StateEncoder
from stamo_dist.recipe.find import find_recipe
from stamo_dist.recipe.load import load
from stamo_dist.recipe.policy import WorldModel
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, open_run
from stamo_dist.tasks.policy_data import network_config

NONE, STAMO, DINOV2 = PARTS = ("no head", "StaMo head", "raw DINOv2 head")
_TEXT = "put the red block into the drawer"
_STATE, _PATCHES = (2, 1024), (256, 1024)  # of the full-size tokenizer, if the policy uses none
_ACTION_DIM, _PROPRIO_DIM = 7, 8  # LIBERO's
WARM = 3  # warm-up calls, not counted


def speed(**options: Any) -> Measurement:
    """The measurement for the tokenizer or policy that the options name."""
    if not options["run"].exists():
        options["run"] = find_recipe(options["run"])
    path = options["run"]
    resolved = RunFolder(path).resolved
    is_policy = path.is_file() or (resolved.is_file() and load(resolved).recipe.stage == "policy")
    return (PolicySpeed if is_policy else TokenizerSpeed)(**options)


class SpeedMeasurement(SpeedOptions, Measurement):
    """Shared by the tokenizer's and the policy's measurement."""

    name = "speed"
    by = ("device", "part", "batch")
    better: ClassVar = {"hz": "higher"}

    def devices(self) -> list[str]:
        """Raises: RunError: One that was asked for is not there."""
        there = ["cpu", "cuda"] if Device.current().is_gpu else ["cpu"]
        if missing := set(self.device or ()) - set(there):
            raise RunError(f"--device {', '.join(sorted(missing))}: this machine has {', '.join(there)}")
        return self.device or there

    def timed(
        self, calls: Mapping[str, Callable[[], object]], device: str, batch: int, watched: TaskID
    ) -> dict[str, tuple[dict[str, Any], Tensor]]:
        """A table row for each named call, and the seconds, (calls,); the calls are interleaved."""
        found: dict[str, list[float]] = {part: [] for part in calls}
        wait = Device.named(device).synchronize
        for _ in range(WARM + self.calls):
            for part, call in calls.items():
                start = time.perf_counter()
                call()
                wait()
                found[part].append(time.perf_counter() - start)
                self.bar.advance(watched)
        seconds = {part: torch.tensor(times[WARM:], dtype=torch.float64) for part, times in found.items()}
        return {part: (speed_row(device, part, batch, times), times) for part, times in seconds.items()}


def speed_columns(what: str) -> dict[str, str]:
    columns = {"device": "device", "part": "part", "batch": f"{what} at once", "hz": f"{what}/s"}
    return {**columns, "low": "10 %", "high": "90 %", "ms": "ms a call"}


def speed_row(device: str, part: str, batch: int, seconds: Tensor) -> dict[str, Any]:
    """A row of the table from the seconds of each call, (calls,)."""
    median = seconds.median().item()
    return {
        "device": Device.named(device).name,
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
                    rows.append(self.timed({part: call}, device, batch, watched)[part][0])
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


class PolicySpeed(SpeedMeasurement):
    """Speed of a run's or recipe's policy; for a recipe the weights are random, as the cost does not depend on them."""

    title = "Speed of the policy"
    about = (
        "From frames and instruction to actions, everything between included; the variants take turns call by call. "
        f"Median over the calls after {WARM} that are not counted; a tenth of the calls was slower than 10 %, and a "
        "tenth faster than 90 %. of no head: median of the calls' ratios to the call without a head of the same turn."
    )
    columns: ClassVar = {**speed_columns("moments"), "ratio": "of no head"}

    def open(self) -> None:
        self._devices, self._batches = self.devices(), list(self.batch or (1,))
        self._run = None if self.run.is_file() else open_run(self.run)
        if self._run is not None:
            (self._recipe, step), weights = exported_at(self._run), str(self._run.model)
        else:
            self._recipe = load(self.run, self.set_ or ()).recipe
            step, weights = 0, "random weights"
            if self._recipe.stage != "policy" or self._recipe.policy.diffusion is not None:
                raise RunError(
                    "a recipe that is not trained is timed where it is OpenVLA's; give the run folder of another"
                )
        self.provenance = Provenance.of_export(self._recipe, weights, step)
        self.folder = output_folder(self._run or RunFolder(Path(self._recipe.run_dir)), self.name, self.out)

    def settings(self) -> dict[str, Any]:
        size, overrides = self._recipe.data.image_size, list(self.set_ or ())
        return {"batches": self._batches, "calls": self.calls, "image_size": size, "overrides": overrides}

    def results(self) -> Iterator[EvaluationResult]:
        rows: list[dict[str, Any]] = []
        for device in self._devices:
            policy: AnyPolicy
            if self._run is not None:
                policy, _ = open_policy(self.run, device)
            else:
                policy = random_policy(self._recipe, device)
            heads = _heads(policy)
            total = len(self._batches) * len(heads) * (self.calls + WARM)
            watched = self.bar.add_task(f"calls on {device}", total=total)
            for batch in self._batches:
                with torch.no_grad():
                    timed = self.timed(self._variants(policy, heads, batch), device, batch, watched)
                for row, seconds in timed.values():
                    ratio = (timed[NONE][1] / seconds).median().item() if NONE in timed else None
                    rows.append({**row, "ratio": ratio})
            del policy, heads
        yield self.result(rows)

    def _variants(
        self, policy: AnyPolicy, heads: dict[str, WorldHead | None], batch: int
    ) -> dict[str, Callable[[], object]]:
        """The policy's acting function with each of the heads."""
        size, cfg = self._recipe.data.image_size, policy.cfg
        frame = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        images, texts = [[frame] * cfg.views] * batch, [_TEXT] * batch
        key = next(iter(policy.statistics.sources))
        felt = None
        if cfg.proprio:
            felt = np.zeros((batch, len(policy.statistics.range(key, "proprio", cfg.bounds))))

        def act(head: WorldHead | None) -> object:
            if isinstance(policy, Policy):
                policy.network.world_head = head
            return policy.act_batch(images, texts, unnorm_key=key, proprio=felt)

        return {part: partial(act, head) for part, head in heads.items()}


def random_policy(recipe: Recipe, device: str) -> Policy:
    """The recipe's network with random weights, created on the device."""
    cfg = recipe.policy
    _, config = network_config(cfg)
    state_encoder = None
    if cfg.vision == "stamo":
        assert cfg.tokenizer is not None, "the recipe's check wants it"
        state_encoder = StamoVision(StateEncoder.from_pretrained(cfg.tokenizer).to(device))
    patch_dim = state_encoder.patch_dim if state_encoder and cfg.stamo != "states" else None
    state_dim = state_encoder.state_shape[1] if state_encoder and cfg.stamo != "patches" else None
    proprio_dim, state = _PROPRIO_DIM if cfg.proprio else 0, _STATE if cfg.world else None
    sizes = PolicySizes(_ACTION_DIM, recipe.data.horizon, proprio_dim, state, patch_dim, state_dim)
    with loading.on_meta():
        network = PolicyNetwork(config, cfg, sizes)
    network = network.to(Device.named(device).dtype(recipe.train.precision))
    loading.materialise(network, device)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.02)
    ends = {
        column: {"q01": [-1.0] * size, "q99": [1.0] * size, "min": [-1.0] * size, "max": [1.0] * size}
        for column, size in (("action", _ACTION_DIM), ("proprio", _PROPRIO_DIM))
    }
    text = TextTokenizer.from_instructions([_TEXT], size=config.text_vocabulary, bins=config.bins)
    return Policy(
        network.eval(), text, ImageProcessor.from_config(config), Statistics({"any": ends}, "none"), state_encoder
    )


def _targets(policy: Policy) -> tuple[tuple[int, int], tuple[int, int]]:
    """(tokens, dim) of a state and of all patches, of the policy's tokenizer or the full-size one."""
    if policy.vision is None:
        return _STATE, _PATCHES
    return policy.vision.target_shape("state"), policy.vision.target_shape("dinov2")


def _heads(policy: AnyPolicy) -> dict[str, WorldHead | None]:
    """The head of each variant; the diffusion transformer has none."""
    if not isinstance(policy, Policy):
        assert policy.cfg.diffusion is not None, "it is the diffusion policy"
        return {f"diffusion, {policy.cfg.diffusion.sampler_steps} steps": None}
    state, patches = _targets(policy)
    width = (policy.cfg.world or WorldModel()).width
    first = next(policy.network.parameters())
    heads: dict[str, WorldHead | None] = {NONE: None}
    for part, shape in ((STAMO, state), (DINOV2, patches)):
        head = WorldHead(policy.network.vla.config.hidden, *shape, width)
        heads[part] = head.to(device=first.device, dtype=first.dtype).eval()
    return heads
