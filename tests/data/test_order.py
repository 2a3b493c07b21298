"""The order is streaming's, and does not depend on the number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from stamo_dist.data.loader import Cursor, build_loader
from stamo_dist.data.mixture import Mixture
from stamo_dist.recipe.schema import Data, Shuffle

# What the stock loader delivers in two epochs, or in one after a resumption; with the state after each batch.
STOCK = """
import json, os, sys
from stamo_dist import _torchvision
from streaming import Stream, StreamingDataset, StreamingDataLoader

spec = json.load(sys.stdin)
dataset = StreamingDataset(
    streams=[Stream(local=folder, proportion=p) for folder, p in spec["streams"]],
    epoch_size=spec["epoch_size"], batch_size=spec["batch"], shuffle=True, shuffle_algo="py1e",
    shuffle_seed=spec["seed"], shuffle_block_size=spec["block"], num_canonical_nodes=spec["nodes"],
    batching_method="random",
)
keys = lambda rows: {"key": [f"{r['source']} {r['camera']} {r['episode']} {r['t']}" for r in rows]}
loader = StreamingDataLoader(dataset, batch_size=spec["batch"], collate_fn=keys)
if spec["state"]:
    loader.load_state_dict(spec["state"])
batches = [(batch["key"], loader.state_dict()) for epoch in range(spec["epochs"]) for batch in loader]
print(json.dumps(batches), flush=True)
os._exit(0)  # its threads sometimes keep the interpreter from ending
"""


def keys(mixture: Mixture, samples: np.ndarray) -> list[str]:
    from stamo_dist.data.shards import OpenShards

    shards = OpenShards(mixture.shards)
    found = []
    for sample in samples.tolist():
        number = int(mixture.shard_of(np.array(sample)))
        row = shards[number].sample(sample - int(mixture.first[number]))
        found.append(f"{row['source']} {row['camera']} {row['episode']} {row['t']}")
    return found


def test_same_samples_as_the_stock_loader(two: Callable[..., Data], tmp_path: Path) -> None:
    mixture = Mixture(
        two(a=1, b=3, shuffle=Shuffle(canonical_nodes=4, block_size=64), epoch_samples=96), seed=3, global_batch=8
    )

    def stock(epochs: int, state: dict[str, int] | None = None) -> list[tuple[list[str], dict[str, int]]]:
        spec = {
            "streams": [(str(s.folder), float(s.stream.proportion)) for s in mixture.streams],
            "epoch_size": 96, "batch": 8, "seed": 3, "nodes": 4, "block": 64, "epochs": epochs, "state": state,
        }  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-c", STOCK], input=json.dumps(spec), capture_output=True, text=True, check=False,
            timeout=120, env={**os.environ, "TMPDIR": str(tmp_path)},  # it leaves lock files there
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    def ours(cursor: Cursor, n: int) -> list[list[str]]:
        loader = build_loader(mixture, rank=0, world_size=1, ranks_per_node=1, cursor=cursor, pin_memory=False)
        return [keys(mixture, batch.sample.numpy()) for batch in islice(loader, n)]

    theirs = stock(2)
    assert ours(Cursor(), 24) == [names for names, _ in theirs]
    state = theirs[14][1]
    cursor = Cursor(state["epoch"], state["sample_in_epoch"])
    assert cursor == Cursor(1, 24)
    assert ours(cursor, 9) == [names for names, _ in stock(1, state)]


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (1, 4), (2, 2), (4, 1)])
def test_each_rank_gets_the_samples_streaming_deals_it(two: Callable[..., Data], nodes: int, ranks: int) -> None:
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    mixture = Mixture(two(), seed=5, global_batch=16)
    planner = mixture._planner
    planner.batch_size = 16 // (nodes * ranks)
    dealt = generate_work("random", planner, World(nodes, ranks, 1, 0), 2, 32)
    for rank in range(nodes * ranks):
        loader = build_loader(
            mixture, rank=rank, world_size=nodes * ranks, ranks_per_node=ranks, cursor=Cursor(2, 32), pin_memory=False
        )
        expected = dealt[rank // ranks, rank % ranks, 0]
        for batch, samples in zip(loader, expected, strict=False):
            assert batch.sample.tolist() == samples.tolist()


def global_batches(mixture: Mixture, world: int, cursor: Cursor, n: int) -> list[set[int]]:
    loaders = [
        build_loader(mixture, rank=r, world_size=world, ranks_per_node=world, cursor=cursor, pin_memory=False)
        for r in range(world)
    ]
    return [set().union(*(b.sample.tolist() for b in batches)) for batches in islice(zip(*loaders, strict=True), n)]


def test_global_batches_are_the_same_sets_on_any_number_of_processes(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(a=2), seed=0, global_batch=8)
    per_epoch = mixture.epoch_size // 8
    whole = global_batches(mixture, 1, Cursor(), 2 * per_epoch)
    assert whole[:per_epoch] != whole[per_epoch:]
    for world in (2, 4):
        assert global_batches(mixture, world, Cursor(), 2 * per_epoch) == whole
    # Stopped in the middle of the first epoch on two processes, continued on one, two and four.
    stopped = build_loader(mixture, rank=1, world_size=2, ranks_per_node=2, cursor=Cursor(), pin_memory=False)
    cursor = [b.cursor for b in islice(stopped, 5)][-1]
    assert cursor == Cursor(0, 40)
    for world in (1, 2, 4):
        assert global_batches(mixture, world, Cursor.from_dict(cursor.to_dict()), per_epoch) == whole[5 : per_epoch + 5]


def test_without_shuffling_sources_are_read_in_stored_order(two: Callable[..., Data]) -> None:
    mixture = Mixture(two(a=0, shuffle=Shuffle(enabled=False)), seed=0, global_batch=8)
    assert mixture.plan(0).tolist() == mixture.plan(1).tolist() == list(range(80))


def test_an_epoch_is_whole_global_batches_of_existing_samples(two: Callable[..., Data]) -> None:
    for global_batch, epoch_samples in ((6, None), (50, 75), (500, None), (8, 1000)):
        mixture = Mixture(two(epoch_samples=epoch_samples), seed=1, global_batch=global_batch)
        order = mixture.plan(0)
        assert len(order) == mixture.epoch_size
        assert mixture.epoch_size % global_batch == 0
        assert order.min() >= 0
        assert order.max() < mixture.num_samples == 33 * 2 + 80
