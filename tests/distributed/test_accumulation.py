"""What FSDP does between the micro-batches of a step: the collectives it issues, the gradients it holds."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.debug import CommDebugMode

from stamo_dist.distributed.rank import World, reserve_port
from stamo_dist.distributed.strategies import EngineSpec
from stamo_dist.recipe.batching import Batching
from stamo_dist.recipe.training import Strategy

BLOCKS, MICRO_BATCHES = 3, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


def one_step(world: World, port: int, strategy: dict[str, Any], out: Connection) -> None:
    """One optimizer step of a few micro-batches, counted."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world.size)}
    os.environ |= {"RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "LOCAL_WORLD_SIZE": str(world.local_size)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    per_rank = 2 * MICRO_BATCHES
    batching = Batching(world_size=world.size, per_rank=per_rank, micro_batch=2, accumulation=MICRO_BATCHES)
    spec = EngineSpec(Strategy(**strategy), world, batching, None, "fp32", ["Block"])
    engine = spec.build(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert engine.accelerator.is_fsdp2, "as on a GPU"
    calls = CommDebugMode()
    x = torch.arange(world.size * per_rank * 8, dtype=torch.float32).sin().view(-1, 8).chunk(world.size)[world.rank]
    norms, held = [], 0
    counts: Counter[str] = Counter()
    for micro in x.split(2):
        with calls, engine.accumulate():
            norms.append(engine.backward(engine.module(micro).square().mean()))
        if norms[-1] is None:
            held = max(held, unsharded_gradients(engine.module))
        counts += Counter({str(op): n for op, n in calls.get_comm_counts().items()})
    weights = torch.cat([p.full_tensor().flatten() for p in engine.module.parameters()])
    out.send((norms, dict(counts), held, weights.tolist()))
    dist.destroy_process_group()


def unsharded_gradients(module: nn.Module) -> int:
    """Elements of the whole gradients that FSDP keeps."""
    states = [m._get_fsdp_state() for m in module.modules() if isinstance(m, FSDPModule)]
    parameters = [p for state in states for group in state._fsdp_param_groups for p in group.fsdp_params]
    whole = [p.unsharded_param for p in parameters if hasattr(p, "_unsharded_param")]
    kept = [*(p.unsharded_accumulated_grad for p in parameters), *(p.grad for p in whole)]
    return sum(grad.numel() for grad in kept if grad is not None)


def stepped(processes: int, **strategy: Any) -> list[Any]:
    """What each process has to say of it."""
    context, port = multiprocessing.get_context("forkserver"), reserve_port()
    context.set_forkserver_preload(["stamo_dist.distributed.strategies", "torch.distributed.tensor.debug"])
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    ranks = [
        context.Process(target=one_step, args=(World(r, processes, r, processes), port, strategy, pipes[r][1]))
        for r in range(processes)
    ]
    for rank in ranks:
        rank.start()
    found = []
    for receive, _ in pipes:
        assert receive.poll(240), "no answer"
        found.append(receive.recv())
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    return found


def test_gradients_are_reduced_as_the_recipe_says_and_the_step_is_the_same() -> None:
    numbers = BLOCKS * (8 * 8 + 8)
    found = {
        "fsdp": stepped(2, name="fsdp"),
        "whole": stepped(2, name="fsdp", gradients="whole"),
        "hsdp": stepped(4, name="hsdp", shard_group=2),
    }
    kept = stepped(2, name="fsdp", reshard_after_forward=False)
    gathered = [ranks[0][1]["c10d._allgather_base_"] for ranks in (found["fsdp"], kept)]
    assert gathered == [2 * BLOCKS * MICRO_BATCHES, BLOCKS * MICRO_BATCHES], "weights stay until the backward pass"
    assert kept[0][3] == found["fsdp"][0][3]
    for norms, *_ in (one for ranks in found.values() for one in ranks):
        assert norms[:-1] == [None] * (MICRO_BATCHES - 1)
    scattered = {name: ranks[0][1]["c10d._reduce_scatter_base_"] for name, ranks in found.items()}
    assert scattered == {"fsdp": BLOCKS * MICRO_BATCHES, "whole": BLOCKS, "hsdp": BLOCKS * MICRO_BATCHES}
    reduced = {name: ranks[0][1].get("c10d.allreduce_", 0) for name, ranks in found.items()}
    assert reduced == {"fsdp": 0, "whole": 0, "hsdp": BLOCKS}, "copies meet once a step"
    assert {name: ranks[0][2] for name, ranks in found.items()} == {"fsdp": 0, "whole": numbers, "hsdp": 0}
    assert found["whole"][0][0][-1] == pytest.approx(found["fsdp"][0][0][-1], rel=1e-6)
    assert found["whole"][0][3] == pytest.approx(found["fsdp"][0][3], rel=1e-4, abs=1e-7)
