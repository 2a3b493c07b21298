"""The training step: what the loop adds to it, and (on a GPU) how fast the full-size tokenizer trains.

    python benchmarks/step.py overhead recipes/tokenizer_demo.yaml     # share of a step outside the model, CPU or GPU
    python benchmarks/step.py full                                     # SD3-medium DiT + DINOv2-L, 256 px, one GPU
    python benchmarks/step.py policy --lora 32 --batch 16              # OpenVLA's 7 B with adapters, one GPU of 80 GB
    python benchmarks/step.py policy --batch 16                        # the whole 7 B trains, one GPU of 140 GB

`full` prints samples/s, MFU and peak memory of our step (latents online and cached) beside a plain loop on the same
frames: accelerate, diffusers' and transformers' own classes, eager, as diffusers' training examples write it. `policy`
prints the same of OpenVLA beside a loop as the official one: eager, with the logits of every token. Then come both
beside what `stamo plan` predicts of such a step. Weights are random: speed does not depend on them. `--tiny` runs the
same code at toy size and eager, to show without a GPU that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stamo_dist.models  # noqa: F401  # isort: skip  must precede diffusers and transformers
import torch
from _beside import beside, beside_plan, fits, row
from accelerate import Accelerator
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from rich.console import Console
from rich.table import Table
from transformers import Dinov2Config, Dinov2Model

from stamo_dist.data.loader import Batch, Cursor
from stamo_dist.device import Device
from stamo_dist.distributed.collectives import leave
from stamo_dist.distributed.engine import Engine
from stamo_dist.distributed.rank import world_from_environment
from stamo_dist.distributed.strategies import EngineSpec
from stamo_dist.models.compressor import Compressor
from stamo_dist.models.openvla import shapes
from stamo_dist.models.openvla.adapt import prepare
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.network import IGNORE
from stamo_dist.models.openvla.policy_network import Inputs, PolicyNetwork, PolicySizes
from stamo_dist.optim.optimizer import adamw
from stamo_dist.recipe import policy as recipes
from stamo_dist.recipe import schema
from stamo_dist.recipe.batching import batching
from stamo_dist.recipe.load import load
from stamo_dist.tasks.noise import Noise
from stamo_dist.tasks.tokenizer import TokenizerTask
from stamo_dist.tasks.vae import VAETask
from stamo_dist.train import train

FULL = {
    "dit": {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
            "pos_embed_max_size": 192},
    "vae": {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
            "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609,
            "sample_size": 256},
    "dino": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
             "image_size": 224},
    "compressor": {"tokens": 2, "dim": 1024, "width": 1024, "depth": 4, "heads": 16}, "size": 256, "seen": 224,
}  # fmt: skip
TINY = {
    "dit": {**FULL["dit"], "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4,
            "out_channels": 4, "caption_projection_dim": 64},
    "vae": {**FULL["vae"], "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "latent_channels": 4},
    "dino": {**FULL["dino"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56},
    "compressor": {"tokens": 2, "dim": 64, "width": 64, "depth": 1, "heads": 2}, "size": 64, "seen": 56,
}  # fmt: skip


def seconds_per_call(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of `repeats` calls after two warm ones."""
    times = []
    for i in range(repeats + 2):
        Device.current().synchronize()
        start = time.perf_counter()
        call()
        Device.current().synchronize()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def overhead(path: str, steps: int, overrides: list[str]) -> None:
    """The real training, with a clock around forward, backward and optimizer; the first half of it is warm-up."""
    inside: list[float] = []

    def clocked(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            Device.current().synchronize()
            start = time.perf_counter()
            out = call(*args, **kwargs)
            Device.current().synchronize()
            inside.append(time.perf_counter() - start)
            return out

        return timed

    for owner, name in ((TokenizerTask, "loss"), (VAETask, "loss"), (Engine, "backward")):
        setattr(owner, name, clocked(getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"run_dir": folder, "train.steps": steps, "train.log_every": 1, "train.checkpoint.every": steps}
        loaded = load(path, [*(f"{key}={value}" for key, value in fixed.items()), *overrides])
        world = world_from_environment()
        train(loaded, world)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    recipe = loaded.recipe
    plan = batching(recipe.train, world.size)
    calls = 2 * plan.accumulation
    model = [sum(inside[i : i + calls]) for i in range(0, steps * calls, calls)][steps // 2 :]
    ends = [line["seconds"] for line in lines]
    total, n = ends[-1] - ends[steps // 2 - 1], len(model)
    table = Table(title=f"{recipe.name}, {recipe.strategy.name}, batch {recipe.train.global_batch}, {n} steps")
    for column in ("step ms", "forward + backward + optimizer ms", "share outside", "goal"):
        table.add_column(column, justify="right")
    table.add_row(f"{total / n * 1e3:.1f}", f"{sum(model) / n * 1e3:.1f}", f"{1 - sum(model) / total:.2%}", "< 3 %")
    Console().print(table)
    beside(
        "share of a step outside forward, backward and optimizer", 100 * (1 - sum(model) / total), 3, "%", other="goal"
    )


def full_recipe(sizes: dict, batch: int, compiled: bool, cached: bool) -> schema.Recipe:
    recipe = schema.Recipe.model_validate(
        {
            "name": "step",
            "data": {"sources": {"synthetic": {"path": "none"}}, "image_size": sizes["size"],
                     "latents": "cached" if cached else "online"},
            "model": {
                # Trained in the schema's eyes only because it has no weights; it is frozen below.
                "encoder": {"config": sizes["dino"], "image_size": sizes["seen"], "train": True},
                "compressor": sizes["compressor"], "decoder": {"config": sizes["dit"]}, "vae": {"config": sizes["vae"]},
            },
            "train": {"steps": 1, "global_batch": batch, "micro_batch": batch, "compile": compiled},
            "strategy": {"name": "ddp"},
        }
    )  # fmt: skip
    encoder = recipe.model.encoder.model_copy(update={"train": False})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"encoder": encoder})})


def frames(batch: int, size: int, device: torch.device, latents: tuple[int, ...] | None) -> Batch:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=g)
    cached = None if latents is None else torch.randn(batch, *latents, generator=g).to(torch.bfloat16)
    ids = torch.arange(batch)
    return Batch(images=images, sample=ids, source=torch.zeros_like(ids), latents=cached, cursor=Cursor()).to(device)


def ours(sizes: dict, batch: int, compiled: bool, cached: bool) -> tuple[Callable[[], object], float]:
    """Our step, as `stamo_dist.train` makes it: returns the step and its arithmetic per sample."""
    recipe = full_recipe(sizes, batch, compiled, cached)
    world = world_from_environment()
    task = TokenizerTask(recipe)
    spec = EngineSpec(recipe.strategy, world, batching(recipe.train, 1), 1.0, "bf16", task.block_classes)
    engine = spec.build(task.trained, adamw(task.trained, recipe.optimizer))
    task.place(engine.device, torch.bfloat16)
    shape = task.tokenizer.latent_shape if cached else None
    data, noise, step = frames(batch, sizes["size"], engine.device, shape), Noise(0), iter(range(1, 10**9))

    def run() -> None:
        with engine.accumulate():
            engine.backward(task.loss(engine.module, data, noise.at(next(step))).loss)

    return run, task.flops_per_sample()


class PlainModel(torch.nn.Module):
    def __init__(self, sizes: dict):
        super().__init__()
        c = sizes["compressor"]
        self.compressor = Compressor(schema.CompressorConfig(**c), sizes["dino"]["hidden_size"])
        self.transformer = SD3Transformer2DModel(
            **sizes["dit"], joint_attention_dim=c["dim"], pooled_projection_dim=c["tokens"] * c["dim"]
        )

    def forward(self, features: torch.Tensor, z: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        tokens = self.compressor(features)
        return self.transformer(
            hidden_states=z, timestep=timestep, encoder_hidden_states=tokens, pooled_projections=tokens.flatten(1),
            return_dict=False,
        )[0]  # fmt: skip


def plain(sizes: dict, batch: int) -> Callable[[], object]:
    """The peer: accelerate and the libraries' own classes, eager. Its frozen parts run in bf16, as ours do."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=not Device.current().is_gpu)
    device = accelerator.device
    vae = AutoencoderKL(**sizes["vae"]).requires_grad_(False).to(device, torch.bfloat16)
    dino = Dinov2Model(Dinov2Config(**sizes["dino"])).requires_grad_(False).eval().to(device, torch.bfloat16)
    model = PlainModel(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    images = frames(batch, sizes["size"], device, None).images
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    def run() -> None:
        x = images.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            seen = torch.nn.functional.interpolate(x, size=sizes["seen"], mode="bicubic", antialias=True)
            features = dino(((seen - mean) / std).to(torch.bfloat16)).last_hidden_state[:, 1:]
            z0 = vae.encode((x * 2 - 1).to(torch.bfloat16)).latent_dist.sample()
            z0 = (z0 - vae.config.shift_factor) * vae.config.scaling_factor
        noise = torch.randn_like(z0)
        sigma = compute_density_for_timestep_sampling("logit_normal", batch, 0.0, 1.0).to(device)
        s = sigma.view(-1, 1, 1, 1)
        prediction = model(features, ((1 - s) * z0 + s * noise).to(torch.bfloat16), sigma * 1000)
        loss = (prediction.float() - (noise - z0).float()).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def begin_anew() -> None:
    """Forget what was compiled, and give back the memory of the step before."""
    torch._dynamo.reset()
    gc.collect()
    Device.current().release_memory()


def measured(step: Callable[[], object], batch: int, repeats: int) -> tuple[float, float | None]:
    """Samples/s, and bytes at the peak on a GPU."""
    rate, device = batch / seconds_per_call(step, repeats), Device.current()
    return rate, device.peak_memory()[0] if device.is_gpu else None


def show(title: str, rows: list[list[Any]]) -> None:
    table = Table(title=title)
    for column in ("", "samples/s", "MFU", "peak GB", "× plain loop"):
        table.add_column(column, justify="left" if not column else "right")
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def full(batch: int, repeats: int, tiny: bool) -> None:
    sizes, device = TINY if tiny else FULL, Device.current()
    found, flops = dict[str, tuple[float, float | None]](), dict[str, float]()
    for label in ("plain loop", "latents online", "latents cached"):
        begin_anew()
        if label == "plain loop":
            step, own = plain(sizes, batch), 0.0
        else:
            step, own = ours(sizes, batch, compiled=not tiny, cached="cached" in label)
        found[label] = measured(step, batch, repeats)
        del step
        flops[label] = own
    flops["plain loop"] = flops["latents online"]
    reference = found["plain loop"][0]
    rows = [row(label, rate, flops[label], peak, reference) for label, (rate, peak) in found.items()]
    show(f"{'toy size' if tiny else 'full size'}, batch {batch}, {sizes['size']} px, bf16, {device.name}", rows)
    for label in ("latents online", "latents cached"):
        recipe = full_recipe(sizes, batch, compiled=not tiny, cached="cached" in label)
        beside_plan(f"tokenizer, {label}", recipe, *found[label])


SMALL_POLICY = {
    "image_sizes": [56, 56], "timm_kwargs": [{"embed_dim": 32, "depth": 3, "num_heads": 2}] * 2,
    "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000, "hidden_size": 64,
                    "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4},
}  # fmt: skip


TEXT = 72  # ids of prompt, actions and </s>: what `stamo plan` assumes


def moments(network: PolicyNetwork, batch: int, text: int, device: torch.device) -> Inputs:
    """A random batch in which every sample has actions."""
    config, tail = network.vla.config, network.sizes.action_tokens + 1
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.text_vocabulary, (batch, text), generator=g)
    labels = torch.where(torch.arange(text) >= text - tail, ids, IGNORE)
    side = config.towers[0].image_size
    pixels = torch.randn(batch, 3 * len(config.towers), side, side, generator=g)
    tensors = (ids, torch.ones_like(ids, dtype=torch.bool), torch.full((batch,), text - tail), pixels, labels)
    return Inputs(*(t.to(device) for t in tensors))


def policy_step(config: OpenVLAConfig, recipe: schema.Recipe, batch: int, *, plain: bool) -> Callable[[], object]:
    """One step under autocast: ours takes the logits of the actions alone, the plain loop those of every token."""
    device = Device.current().torch_device
    with torch.device(device):
        network = PolicyNetwork(config, recipe.policy, PolicySizes(7))
        prepare(network, recipe.policy, base=torch.bfloat16)
    network.set_gradient_checkpointing(recipe.train.recompute)
    for module in network.modules():
        if recipe.train.compile and not plain and type(module).__name__ in network.block_classes():
            module.forward = torch.compile(module.forward)  # type: ignore[method-assign]
    optimizer, given = adamw(network, schema.Optimizer()), moments(network, batch, TEXT, device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            if plain:
                loss = network.vla(given.input_ids, given.images, given.attention_mask, given.labels)[1]
            else:
                found = network(given)
                loss = (found.action / found.action_count).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def policy_recipe(batch: int, lora: int | None, tiny: bool, compiled: bool, every: int) -> schema.Recipe:
    """What is measured, for the prediction; a run's recipe would refuse adapters on random weights."""
    recipe = schema.Recipe.model_validate(
        {
            "name": "step", "stage": "policy",
            "data": {"sources": {"synthetic": {"path": "none"}}, "image_size": 224, "horizon": 1},
            "policy": {"vision": "fused", "config": SMALL_POLICY if tiny else {}},
            "train": {"steps": 1, "global_batch": batch, "micro_batch": batch, "compile": compiled,
                      "gradient_checkpointing": every or False},
            "strategy": {"name": "ddp"},
        }
    )  # fmt: skip
    adapters = None if lora is None else recipes.Lora(rank=lora)
    return recipe.model_copy(update={"policy": recipe.policy.model_copy(update={"lora": adapters})})


def policy(batch: int, repeats: int, tiny: bool, lora: int | None, every: int) -> None:
    """OpenVLA's step, ours and the plain loop's."""
    device, recipe = Device.current(), policy_recipe(batch, lora, tiny, not tiny, every)
    what = f"policy of {'toy size' if tiny else '7 B'}, {'LoRA' if lora else 'whole'}"
    if (why := fits(recipe)) is not None:
        print(f"» {what}, batch {batch}: not run, {why}")
        return
    config = OpenVLAConfig.from_dict({**OPENVLA_7B, **(SMALL_POLICY if tiny else {})}, "benchmark")
    network = shapes.on_meta(config, recipe.policy, PolicySizes(7))
    flops = shapes.training_flops(network, shapes.TokenCounts(TEXT))
    rows, reference = list[list[Any]](), None
    for label in ("plain loop", "ours"):
        begin_anew()
        try:
            rate, peak = measured(policy_step(config, recipe, batch, plain=label == "plain loop"), batch, repeats)
        except torch.OutOfMemoryError:
            if label == "ours":
                raise
            rows.append([label, "out of memory", "–", "–", "–"])
            continue
        reference = reference or (rate if label == "plain loop" else None)
        rows.append(row(label, rate, flops, peak, reference))
    show(f"{what}, {flops / 1e12:.3g} TF a sample, batch {batch}, {device.name}", rows)
    beside_plan(what, recipe, rate, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    o = commands.add_parser("overhead")
    o.add_argument("recipe")
    o.add_argument("--steps", type=int, default=200)
    o.add_argument("--set", action="append", default=[])
    f = commands.add_parser("full")
    f.add_argument("--batch", type=int, default=48)
    f.add_argument("--repeats", type=int, default=10)
    f.add_argument("--tiny", action="store_true")
    p = commands.add_parser("policy")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--lora", type=int, metavar="RANK")
    p.add_argument("--recompute", type=int, default=0, metavar="K", help="every k-th block; 0: none")
    p.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    if a.command != "overhead":
        Device.current().tune("bf16")  # before the device is used; the plain loop has it too
    if a.command == "overhead":
        overhead(a.recipe, a.steps, a.set)
    elif a.command == "policy":
        policy(a.batch, a.repeats, a.tiny, a.lora, a.recompute)
    else:
        full(a.batch, a.repeats, a.tiny)
    leave(0)


if __name__ == "__main__":
    main()
