"""Training steps of the full-size models on the meta device: no memory, no arithmetic, the product's own code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from toy import make_source
from toy_policy import make_policy_data, set_statistics

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.data.loader import Batch, Cursor
from stamo_dist.data.mixture import Mixture
from stamo_dist.distributed.engine import Engine
from stamo_dist.distributed.rank import World
from stamo_dist.optim.ema import EMA
from stamo_dist.optim.optimizer import adamw
from stamo_dist.optim.schedule import RateSchedule
from stamo_dist.plan.registry import PAPER
from stamo_dist.recipe import policy as policies
from stamo_dist.recipe.batching import Batching
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.state import RunState
from stamo_dist.tasks import policy as policy_tasks
from stamo_dist.tasks.base import Task
from stamo_dist.tasks.noise import Noise
from stamo_dist.tasks.policy import PolicyTask
from stamo_dist.tasks.tokenizer import TokenizerTask
from stamo_dist.training.trainer import Trainer

META = torch.device("meta")


class MetaEngine(Engine):
    """A process of its own whose device is the meta device; in pure bf16, as ZeRO and FSDP compute."""

    @property
    def device(self) -> torch.device:
        return META


@dataclass
class Step:
    """One step of a task, whose module and batch lie on the meta device."""

    recipe: Recipe
    task: Task
    batch: Batch

    def loss(self, number: int = 1) -> Tensor:
        """Of a micro-batch in step `number`."""
        return self.task.loss(self.task.trained, self.batch, Noise(0).at(number)).loss

    def trainer(self) -> Trainer:
        """The loop around it, with AdamW and its moving average."""
        optimizer = adamw(self.task.trained, self.recipe.optimizer)
        for group in optimizer.param_groups:
            group["foreach"] = True  # fused kernels know no meta device
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        world = World(0, 1, 0, 1)
        engine = MetaEngine("fsdp", world, accelerator, self.task.trained, optimizer, self.recipe.optimizer.clip)
        state = RunState(cursor=Cursor().to_dict(), samples=[0], skipped=[0])
        average = EMA(engine, 0.999)
        rows, schedule = len(self.batch), RateSchedule.of(self.recipe)
        spread = Batching(world_size=1, per_rank=rows, micro_batch=rows // 2, accumulation=2)
        return Trainer(
            self.recipe, self.task, engine, average, state, schedule, [spread], _unused, _unused, (), _unused
        )


def _unused(*_: Any) -> Any:
    return None


def tokenizer(batch: int, *, compiled: bool, checkpointing: int = 0) -> Step:
    """DINOv2-L, a compressor of 2 × 1024 and SD3-medium's transformer, 256 px."""
    recipe = Recipe.model_validate(
        {
            "name": "traced",
            "data": {"sources": {"none": {"path": "none"}}, "image_size": 256},
            "model": {
                # Trained in the schema's eyes only because it has no weights; it is frozen below.
                "encoder": {"config": PAPER["encoder"], "image_size": 224, "train": True},
                "compressor": {"tokens": 2, "dim": 1024, "width": 1024, "depth": 4, "heads": 16},
                "decoder": {"config": PAPER["decoder"]},
                "vae": {"config": PAPER["vae"]},
            },
            "train": {
                "steps": 1, "global_batch": batch, "micro_batch": batch, "compile": compiled,
                "gradient_checkpointing": checkpointing or False,
            },
        }
    )  # fmt: skip
    encoder = recipe.model.encoder.model_copy(update={"train": False})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"encoder": encoder})})
    with META:
        task = TokenizerTask(recipe)
    task.tokenizer._frozen_fingerprints = {}  # there are no bytes to look at
    task.place(META, torch.bfloat16)
    images = torch.empty(batch, 256, 256, 3, dtype=torch.uint8, device=META)
    return Step(recipe, _in_bf16(task), Batch(images, **_numbers(batch)))


def write_sources(root: Path) -> Path:
    """What full-size policies read: frames of 224 px with actions, and a toy tokenizer with frames of 32 px."""
    make_policy_data(root)
    set_statistics(make_source(root / "large", "a", size=224))
    return root


def policy(
    root: Path, batch: int, *, compiled: bool, train: dict[str, Any], lora: int | None = None, **fields: Any
) -> Step:
    """openvla-7b, with adapters of rank `lora`. With `vision: stamo` it sees 32 px through a toy tokenizer."""
    sees = fields.get("vision") == "stamo"
    size, folder = (32, "shards") if sees else (224, "large")
    horizon = 8 if fields.get("actions") == "regression" else 1
    settings = {"steps": 1, "global_batch": batch, "micro_batch": batch, "compile": compiled, **train}
    recipe = Recipe.model_validate(
        {
            "name": "traced", "stage": "policy",
            "data": {"sources": {"a": {"path": str(root / folder / "a"), "instruction": "move the square"}},
                     "image_size": size, "horizon": horizon},
            "policy": {"vision": "fused", **({"tokenizer": str(root / "tokenizer")} if sees else {}), **fields},
            "train": settings,
        }
    )  # fmt: skip
    if lora is not None:  # a run refuses adapters on random weights
        adapted = recipe.policy.model_copy(update={"lora": policies.Lora(rank=lora)})
        recipe = recipe.model_copy(update={"policy": adapted})
    mixture = Mixture(recipe.data, seed=0, global_batch=batch)
    task = PolicyTask(recipe, mixture)
    task.place(META, torch.bfloat16)
    rows = _numbers(batch)
    images = torch.empty(batch, size, size, 3, dtype=torch.uint8, device=META)
    given = {
        "actions": torch.empty(batch, horizon, 3, device=META),
        "mask": torch.empty(batch, horizon, dtype=torch.bool, device=META),
        "ahead": torch.empty(batch, dtype=torch.int64, device=META),
        "proprio": torch.empty(batch, 2, device=META),
        "target": images,
    }
    return Step(recipe, _in_bf16(task), Batch(images, **rows, **given))


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies are built without memory, with adapters on weights that are not there."""
    build = policy_tasks.PolicyNetwork

    def network(*arguments: Any) -> nn.Module:
        with META:
            return build(*arguments)

    prepare = policy_tasks.prepare

    def adapted(*arguments: Any) -> list[str]:
        with META:
            return prepare(*arguments)

    monkeypatch.setattr(policy_tasks, "PolicyNetwork", network)
    monkeypatch.setattr(policy_tasks, "prepare", adapted)
    # Llama turns autocast off around its rotations, and the meta device has none.
    autocast = torch.autocast

    def without(device_type: str, **options: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, **options)

    monkeypatch.setattr(torch, "autocast", without)


def _in_bf16(task: Any) -> Task:
    task.trained.bfloat16().train()
    return task


def _numbers(batch: int) -> dict[str, Any]:
    ids = torch.empty(batch, dtype=torch.int64, device=META)
    return {
        "sample": ids,
        "source": torch.empty_like(ids),
        "cursor": Cursor(),
        "replaced": torch.empty(batch, dtype=torch.bool, device=META),
    }


@contextlib.contextmanager
def counted_compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Has `torch.compile` trace and guard as ever, and run the graphs as they are; gives them as they come."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield graphs
    torch._dynamo.reset()
