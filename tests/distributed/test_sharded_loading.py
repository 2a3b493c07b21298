"""Under FSDP a checkpoint goes straight into the shards: no process ever holds the whole model."""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import os
import re
import shutil
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from toy import write_recipe
from toy_policy import TEXTS, write_policy_recipe

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.data.mixture import Mixture
from stamo_dist.distributed.ranges import WEIGHT, other_ranges, own, shapes, trained_ranges
from stamo_dist.distributed.rank import World, reserve_port
from stamo_dist.distributed.strategies import EngineSpec
from stamo_dist.export_layout import ExportLayout
from stamo_dist.models.openvla.actions import Statistics
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.images import ImageProcessor
from stamo_dist.models.openvla.policy_network import PolicyNetwork, PolicySizes
from stamo_dist.models.openvla.save import PolicyParts, save_parts
from stamo_dist.models.openvla.text import TextTokenizer
from stamo_dist.optim.optimizer import adamw
from stamo_dist.recipe import policy as recipes
from stamo_dist.recipe.batching import batching
from stamo_dist.recipe.load import load
from stamo_dist.recipe.training import Strategy
from stamo_dist.tasks import build_task

LLAMA = {"vocab_size": 448, "pad_token_id": 384, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL = {**LLAMA, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
LARGE = {**LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 9}


def checkpoint(folder: Path, text_config: dict, patch_dim: int = 32) -> Path:
    """A released folder's layout, with random weights and no towers; patches of 32 numbers are the toy's."""
    torch.manual_seed(3)
    raw = {**OPENVLA_7B, "pad_token_id": 384, "text_config": {"model_type": "llama", **text_config}}
    config = OpenVLAConfig.from_dict(raw, "test").with_vision("stamo")
    network = PolicyNetwork(
        config, recipes.OpenVLAPolicyConfig(vision="stamo"), PolicySizes(3, patch_dim=patch_dim, state_dim=32)
    )
    text = TextTokenizer.from_instructions(TEXTS, size=384)
    parts = PolicyParts(network, text, ImageProcessor.from_config(config), Statistics({}, "test"))
    save_parts(folder, parts, network.state_dict(), ExportLayout(shard_size="50MB"))
    return folder


def write(path: Path, root: Path, weights: Path, name: str = "fsdp") -> Path:
    """The toy policy's recipe, starting from `weights`."""
    recipe = write_policy_recipe(path, root, strategy=name)
    text = re.sub(r"  config:\n(    .*\n)+", "", recipe.read_text())
    recipe.write_text(text.replace("policy:\n", f"policy:\n  weights: {weights}\n"))
    return recipe


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [False, True])
def test_the_losses_are_those_of_whole_copies_and_of_a_resumed_run(toy_policy, ranks, tmp_path, lora) -> None:
    """With adapters beside a projector that starts at random, and a base in bf16 where the run is."""
    weights = checkpoint(tmp_path / "weights", SMALL, patch_dim=16 if lora else 32)
    settings = ["--set", "train.steps=4", "--set", "train.checkpoint.every=2"]
    settings += ["--set", "policy.lora.rank=4"] if lora else []
    found = {}
    precise = [("ddp", 1, "fp32"), ("fsdp", 2, "fp32"), ("fsdp", 2, "bf16")]
    mixed = [("ddp", 1, "bf16"), ("zero3", 2, "bf16"), ("fsdp", 2, "bf16")]
    for name, processes, precision in mixed if lora else precise:
        folder = tmp_path / f"{name}_{precision}"
        recipe = write(folder / "toy.yaml", toy_policy, weights, name)
        ranks(processes, "train", recipe, *settings, "--set", f"train.precision={precision}")
        found[f"{name}_{precision}"] = [line["loss"] for line in lines(folder / "run")]
    for name, losses in found.items():
        assert losses == pytest.approx(next(iter(found.values())), rel=1e-4 if name == "fsdp_fp32" else 2e-2), name

    last = "fsdp_bf16" if lora else "fsdp_fp32"
    run = tmp_path / last / "run"
    again = ["--set", f"train.precision={last[-4:]}"]
    before, model = lines(run), (run / "model/model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints/step_00000004")
    assert "after step 2" in ranks(2, "train", tmp_path / last / "toy.yaml", *settings, *again)[1]
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in before]
    assert (run / "model/model.safetensors").read_bytes() == model


def test_a_tokenizer_s_decoder_too(toy, ranks, tmp_path) -> None:
    first = write_recipe(tmp_path / "first/toy.yaml", toy.shards, toy.vae)
    ranks(1, "train", first, "--set", "train.steps=2")
    found = {}
    for name, processes in (("ddp", 1), ("fsdp", 2)):
        recipe = write_recipe(tmp_path / name / "toy.yaml", toy.shards, toy.vae, strategy=name)
        weights = f"model.decoder.weights={load(first).recipe.run_dir}/model/transformer"
        ranks(processes, "train", recipe, "--set", weights, "--set", "train.steps=3")
        found[name] = [line["loss"] for line in lines(Path(load(recipe).recipe.run_dir))]
    assert found["fsdp"] == pytest.approx(found["ddp"], rel=1e-4)


def private_bytes() -> int:
    """Memory of this process that is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


class Peak:
    """The most private memory while it is watched, over what there was before."""

    def __enter__(self) -> Peak:
        self._before, self.bytes, self._on = private_bytes(), 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.bytes = max(self.bytes, private_bytes() - self._before)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


def _rank(rank: int, port: int, recipe: str, strategy: str, meta_init: bool, answer: Connection) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed is given back, and not kept for later
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    r = load(recipe).recipe
    mixture = Mixture(r.data, seed=0, global_batch=8)
    if strategy == "zero3":
        from deepspeed.runtime.zero import Init  # noqa: F401  which takes memory of its own
    with Peak() as peak:
        task = build_task(r, mixture, meta_init=meta_init)
        world = World(rank, 2, rank, 2)
        spec = EngineSpec(Strategy(name=strategy), world, batching(r.train, 2), 1.0, "fp32", task.block_classes)
        accelerator = spec.connect()
        if strategy == "fsdp":
            engine = spec.build(task.trained, adamw(task.trained, r.optimizer), accelerator)
        elif meta_init:
            spec.give_memory(task.trained, accelerator)
        if meta_init:
            task.load_weights()
    if strategy == "zero3":  # which makes masters, moments and buffers besides
        engine = spec.build(task.trained, adamw(task.trained, r.optimizer), accelerator)
    held = [*trained_ranges(engine), *other_ranges(engine)]
    elements = {r.name: (r.start, r.flat(WEIGHT).double().sum().item(), r.flat(WEIGHT).double().square().sum().item())
                for r in own(held)}  # fmt: skip
    if strategy == "fsdp":
        trained = {id(p) for p in task.trained.parameters() if p.requires_grad}
        assert {id(p) for group in engine.optimizer.param_groups for p in group["params"]} == trained
    answer.send((peak.bytes, elements, 4 * sum(math.prod(s) for s in shapes(task.trained).values())))
    torch.distributed.destroy_process_group()
    os._exit(0)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_no_process_holds_the_whole_model(toy_policy: Path, tmp_path: Path, strategy: str) -> None:
    weights = checkpoint(tmp_path / "weights", LARGE)
    recipe = write(tmp_path / "toy.yaml", toy_policy, weights)
    context, found = multiprocessing.get_context("spawn"), {}
    for meta_init in (True, False):
        port, ranks = reserve_port(), []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(rank, port, str(recipe), strategy, meta_init, there))
            process.start()
            ranks.append((process, here))
        found[meta_init] = [here.recv() for _, here in ranks if here.poll(120)]
        for process, _ in ranks:
            process.join(30)
        assert len(found[meta_init]) == 2
    total = found[True][0][2]
    assert total > 200e6
    largest = 768 * 2048 * 4
    for (peak, elements, _), (most, whole, _) in zip(found[True], found[False], strict=True):
        assert peak < total / 2 + 4 * largest + 30e6, f"{peak / 1e6:.0f} MB of {total / 1e6:.0f}"
        assert most > 0.95 * total, "the measurement sees a whole copy"
        assert elements == whole
