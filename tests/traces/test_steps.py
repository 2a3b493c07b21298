"""Full-size training steps, traced: what torch.compile makes of them, where the host waits, which attention runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_size import Step, counted_compilations, on_meta, policy, tokenizer, write_sources  # noqa: F401
from watch import Attentions, HostWaits

Build = Callable[..., Step]
LORA = {"lora": 32}
OFT = {"actions": "regression", "film": True, "proprio": True, "lora": 32}
SEEING = {"vision": "stamo", "stamo": "both", "world": {"target": "state"}}
KINDS = {"tokenizer": None, "full": SEEING, "lora": LORA, "oft_film": OFT}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(params=list(KINDS))
def build(request: pytest.FixtureRequest, sources: Path, on_meta: None) -> Build:  # noqa: F811
    fields = KINDS[request.param]

    def of_kind(batch: int = 4, **options: Any) -> Step:
        checkpointing = options.pop("checkpointing", 0)
        if fields is None:
            return tokenizer(batch, checkpointing=checkpointing, **options)
        train = {"gradient_checkpointing": checkpointing or False}
        return policy(sources, batch, train=train, **options, **fields)

    return of_kind


@pytest.mark.parametrize(
    "checkpointing", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["kept", "every second recomputed"]
)
def test_blocks_compile_whole_and_once(build: Build, checkpointing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_compilations(monkeypatch) as graphs:
        step = build(compiled=True, checkpointing=checkpointing)
        after = []
        for number in (1, 2, 3):
            step.loss(number).backward()
            after.append(len(graphs))
        breaks = dict(torch._dynamo.utils.counters["graph_break"])
    assert breaks == {}
    assert 0 < after[0] < 12, "equal blocks share their graphs"
    assert after[1] == after[-1], "nothing is compiled again after the second step"


def test_what_waits_is_seen() -> None:
    on_device, here = torch.empty(3, device="meta"), torch.ones(3)
    waiting: list[Callable[[], object]] = [
        on_device.sum().item,
        lambda: bool(on_device.any()),
        on_device.nonzero,
        lambda: on_device[on_device > 0],
        lambda: torch.tensor([1.0], device="meta"),
        on_device.cpu,
        lambda: here.to("meta"),
        lambda: on_device.copy_(here),
    ]
    for call in waiting:
        with HostWaits() as waits, contextlib.suppress(RuntimeError, NotImplementedError):  # which have no meta kernel
            call()
        assert len(waits.found) == 1, call
    with HostWaits() as waits:
        here.to("meta", non_blocking=True)
        torch.where(on_device > 0, on_device, 0.0)
        here.sum().item()
    assert waits.found == []


def test_the_host_waits_once_a_step(build: Build) -> None:
    trainer = (step := build(compiled=False)).trainer()
    with HostWaits():
        trainer.step(step.batch)  # constants come to the device once
    with HostWaits() as waits:
        trainer.step(step.batch)
    assert waits.found == ["aten._local_scalar_dense.default"], "the gradient's norm alone"


def test_attention_never_falls_to_the_math_kernel(build: Build) -> None:
    step = build(compiled=False)
    with Attentions() as attention:
        step.loss().backward()
    slower = {call for call in attention.found if call.kernel != "flash"}
    # Heads of 512 in the VAE's one block, OFT's mask of what is padding, and the toy's frozen compressor in float32.
    assert {call.kernel for call in slower} <= {"efficient"}
    assert all(call.query[-1] == 512 or call.mask or call.dtype == torch.float32 for call in slower)
    masked = {call for call in attention.found if call.mask is not None}
    assert bool(masked) == step.recipe.policy.film, "what is causal needs no mask"
