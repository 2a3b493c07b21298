"""How many moments a second a policy acts in, and what the world head costs: none, StaMo's, raw DINOv2's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from stamo_dist.errors import RunError
from stamo_dist.evaluate.actions import open_policy, provenance_of
from stamo_dist.evaluate.common import Provenance, Result, output_folder, progress
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
from stamo_dist.recipe.load import load
from stamo_dist.recipe.policy import WorldModel
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder, open_run
from stamo_dist.tasks.policy_data import network_config

NAME = "speed"
NONE, STAMO, DINOV2 = PARTS = ("no head", "StaMo head", "raw DINOv2 head")
_WARM = 3
_TEXT = "put the red block into the drawer"
_STATE, _PATCHES = (2, 1024), (256, 1024)  # of the full-size tokenizer, where the policy sees through none
_ACTION_DIM, _PROPRIO_DIM = 7, 8  # LIBERO's
_COLUMNS = {
    "device": "device",
    "part": "part",
    "batch": "moments at once",
    "hz": "moments/s",
    "low": "10 %",
    "high": "90 %",
    "ms": "ms a call",
    "ratio": "of no head",
}
_ABOUT = (
    "From frames and instruction to actions, everything between included; the variants take turns call by call. Median "
    f"over the calls after {_WARM} that are not counted; a tenth of the calls was slower than 10 %, and a tenth faster "
    "than 90 %. of no head: median of the calls' ratios to the call without a head of the same turn."
)


def policy_speed(
    path: Path,
    *,
    settings: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    calls: int = 30,
    devices: Sequence[str] | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> Result:
    """Time a policy with each head on every device and write eval/speed/ of its run folder.

    `path` is a run, or a recipe, whose network is then built with random weights: what it costs does not depend on
    them. `settings` are overrides of a recipe. `batches`: moments at once. `devices`: "cpu", "cuda".

    Raises:
        StamoError: No such run or recipe, nothing exported yet, or a device that is not there; nothing was written.
    """
    console = console or Console()
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if missing := set(devices or there) - set(there):
        raise RunError(f"--device {', '.join(sorted(missing))}: this machine has {', '.join(there)}")
    is_recipe = path.is_file()
    run = None if is_recipe else open_run(path)
    recipe = load(path, settings).recipe if run is None else load(run.resolved).recipe
    rows: list[dict[str, Any]] = []
    with progress(console) as bar:
        for device in devices or there:
            policy, provenance = _open(run, recipe, device)
            heads = _heads(policy)
            name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
            watched = bar.add_task(f"calls on {device}", total=len(batches) * len(heads) * (calls + _WARM))
            for batch in batches:
                seconds = _time(policy, heads, recipe, batch, calls, lambda t=watched: bar.advance(t))  # type: ignore[misc]
                rows += [_row(name, part, batch, found, seconds.get(NONE)) for part, found in seconds.items()]
            del policy, heads
    folder = output_folder(run or RunFolder(Path(recipe.run_dir)), NAME, out)
    about = {"batches": list(batches), "calls": calls, "image_size": recipe.data.image_size, "overrides": [*settings]}
    result = Result(
        NAME, "Speed of the policy", _ABOUT, _COLUMNS, rows, about, provenance,
        by=["device", "part", "batch"], better={"hz": "higher"},
    )  # fmt: skip
    result.write(folder)
    result.show(console, folder)
    return result


def _open(run: RunFolder | None, recipe: Recipe, device: str) -> tuple[AnyPolicy, Provenance]:
    if run is not None:
        return open_policy(run, recipe, device)
    if recipe.stage != "policy" or recipe.policy.diffusion is not None:
        raise RunError("a recipe that is not trained is timed where it is OpenVLA's; give the run folder of another")
    return _random_policy(recipe, device), provenance_of(recipe, "random weights", 0)


def _random_policy(recipe: Recipe, device: str) -> Policy:
    """The recipe's network without anybody's weights, straight on the device."""
    cfg = recipe.policy
    _, config = network_config(cfg)
    state_encoder = None
    if cfg.vision == "stamo":
        assert cfg.tokenizer is not None, "the recipe's check wants it"
        state_encoder = StamoVision(StateEncoder.from_pretrained(cfg.tokenizer).to(device))
    sizes = PolicySizes(
        _ACTION_DIM, recipe.data.horizon, _PROPRIO_DIM if cfg.proprio else 0, _STATE if cfg.world else None,
        state_encoder.patch_dim if state_encoder and cfg.stamo != "states" else None,
        state_encoder.state_shape[1] if state_encoder and cfg.stamo != "patches" else None,
    )  # fmt: skip
    with loading.on_meta():
        network = PolicyNetwork(config, cfg, sizes)
    network = network.to(torch.bfloat16 if device == "cuda" and recipe.train.precision == "bf16" else torch.float32)
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
    """(tokens, dim) of a state and of all patches: of the tokenizer it sees through, or of the full-size one."""
    if policy.vision is None:
        return _STATE, _PATCHES
    return policy.vision.target_shape("state"), policy.vision.target_shape("dinov2")


def _heads(policy: AnyPolicy) -> dict[str, WorldHead | None]:
    """Each variant's head; the diffusion transformer has none."""
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


@torch.no_grad()
def _time(
    policy: AnyPolicy, heads: dict[str, WorldHead | None], recipe: Recipe, batch: int, calls: int,
    advance: Callable[[], None],
) -> dict[str, Tensor]:  # fmt: skip
    """Seconds of each timed call of each variant, (calls,)."""
    size, cfg = recipe.data.image_size, policy.cfg
    frame = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    images, texts = [[frame] * cfg.views] * batch, [_TEXT] * batch
    key = next(iter(policy.statistics.sources))
    felt = None
    if cfg.proprio:
        felt = np.zeros((batch, len(policy.statistics.range(key, "proprio", cfg.bounds))))
    seconds: dict[str, list[float]] = {part: [] for part in heads}
    for _ in range(_WARM + calls):
        for part, head in heads.items():
            if isinstance(policy, Policy):
                policy.network.world_head = head
            start = time.perf_counter()
            policy.act_batch(images, texts, unnorm_key=key, proprio=felt)
            if policy.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[part].append(time.perf_counter() - start)
            advance()
    return {part: torch.tensor(found[_WARM:], dtype=torch.float64) for part, found in seconds.items()}


def _row(device: str, part: str, batch: int, seconds: Tensor, none: Tensor | None) -> dict[str, Any]:
    median = seconds.median().item()
    return {
        "device": device, "part": part, "batch": batch, "hz": batch / median,
        "low": batch / seconds.quantile(0.9).item(), "high": batch / seconds.quantile(0.1).item(), "ms": 1000 * median,
        "ratio": None if none is None else (none / seconds).median().item(),
    }  # fmt: skip
