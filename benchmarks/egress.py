"""How often shards are downloaded, and how well a batch is shuffled, on 1 to 512 nodes: ours and streaming's.

python benchmarks/egress.py [--nodes 1 8 64 512] [--shards 100000 1000] [--sources 50] [--lanes 4096]

Nothing is read: the real orders are planned over one whole pass, and each node's samples are counted by shard.
amplification: shards that the nodes fetch, each once, over all nodes ÷ those that are read at all (limit 1).
variance: of a batch's mean of an attribute that drifts along each source's stored order ÷ that of independent draws.
shards a batch: different ones in one batch; open a node: most shards of a node that are begun and not finished.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

PER_SHARD = 4096
BATCH = 4096
RANKS = 8  # of a node


class World:
    """Sources of shards, their weights, and the batches that one pass takes."""

    def __init__(self, shards: list[int], weights: list[float], most: int | None = None):
        self.counts = [np.full(n, PER_SHARD, np.int64) for n in shards]
        begins = np.cumsum([0, *shards[:-1]]) * PER_SHARD
        self.shards = [
            (b + np.arange(n) * PER_SHARD, np.full(n, PER_SHARD)) for b, n in zip(begins, shards, strict=True)
        ]
        self.weights, self.total = weights, sum(shards)
        self.batches = min(most or self.total, self.total * PER_SHARD // BATCH)

    def drift(self, samples: np.ndarray) -> np.ndarray:
        """From 0 to 1 along each source, of each sample."""
        begins = np.array([first[0] for first, _ in self.shards])
        source = np.searchsorted(begins, samples, side="right") - 1
        return (samples - begins[source]) / np.array([len(counts) * PER_SHARD for counts in self.counts])[source]


def lanes(world: World, most: int) -> Iterator[np.ndarray]:
    """Batches in the order of their slots, (B,)."""
    from stamo_dist.data.allocation import Allocation
    from stamo_dist.data.lane_order import LaneOrder

    allocation = Allocation([{0: w} for w in world.weights], [np.inf] * len(world.weights), BATCH)
    order = LaneOrder(allocation, world.shards, BATCH, most, seed=0)
    for batch in range(0, world.batches, 64):
        yield from order.plan(batch, min(64, world.batches - batch)).samples


def groups(world: World) -> Iterator[np.ndarray]:
    """The order before lanes."""
    from stamo_dist.data.group_order import GroupOrder, SourceOrder
    from stamo_dist.data.schedule import Schedule
    from stamo_dist.recipe.sampling import Shuffle

    schedule = Schedule([{0: w} for w in world.weights], [np.inf] * len(world.weights))
    orders = [SourceOrder(first, counts, Shuffle(), seed=0) for first, counts in world.shards]
    order = GroupOrder(schedule, orders, BATCH, seed=0, shuffle=True)
    # Ranks take every n-th slot: laid side by side here.
    mix = np.arange(BATCH).reshape(-1, BATCH).T.ravel()
    for batch in range(0, world.batches, 8):
        yield from order.plan(batch, min(8, world.batches - batch)).samples[:, mix]


def streaming(world: World, nodes: int) -> Iterator[np.ndarray]:
    """One source in py1e, as many canonical nodes as nodes: node after node, (B,) a batch."""
    import stamo_dist._streaming  # noqa: F401, I001  must precede streaming
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    counts = np.concatenate(world.counts)
    own = BATCH // nodes // RANKS
    ids = get_partitions("relaxed", int(counts.sum()), nodes, nodes, RANKS, 1, own or 1, 0, nodes)
    shuffled = get_shuffle("py1e", counts, nodes, 0, 0, 1 << 18)
    # (nodes, ranks, workers, batches, samples) → a global batch after another
    batches = ids.transpose(3, 0, 1, 2, 4).reshape(ids.shape[3], -1)
    for batch in batches[: world.batches]:
        yield shuffled[batch[batch >= 0]]


def measure(batches: Iterator[np.ndarray], world: World, nodes: list[int]) -> dict[int, dict[str, float]]:
    """Figures by number of nodes, of one order."""
    seen = {n: np.zeros((n, world.total), bool) for n in nodes}
    means, spread, different = [], [], []
    last: dict[int, np.ndarray] = {n: np.full((n, world.total), -1, np.int32) for n in nodes if n * world.total < 6e7}
    first = {n: np.full((n, world.total), -1, np.int32) for n in last}
    for number, samples in enumerate(batches):
        shards = samples // PER_SHARD
        for n in nodes:
            node = np.arange(len(shards)) * n // len(shards)
            seen[n][node, shards] = True
            if n in last:
                fresh = first[n][node, shards] < 0
                first[n][node[fresh], shards[fresh]] = number
                last[n][node, shards] = number
        drift = world.drift(samples)
        means.append(drift.mean())
        spread.append(drift.var())
        different.append(len(np.unique(shards)))
    variance = float(np.var(means) / (np.mean(spread) / BATCH))
    found = {}
    for n in nodes:
        touched = seen[n].any(0).sum()
        found[n] = {"amplification": seen[n].sum() / touched, "variance": variance, "different": np.mean(different)}
        if n in last:
            found[n]["open"] = max(_open(f[f >= 0], e[f >= 0]) for f, e in zip(first[n][:8], last[n][:8], strict=True))
    return found


def _open(first: np.ndarray, last: np.ndarray) -> int:
    """Most shards that are begun and not finished at one moment of a pass."""
    change = np.bincount(first, minlength=last.max() + 2) - np.bincount(last + 1, minlength=last.max() + 2)
    return int(change.cumsum().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--shards", type=int, nargs="*", default=[100_000, 1_000], help="of the worlds of one source")
    parser.add_argument("--sources", type=int, default=50, help="of the world of many: 20 to 5,000 shards each")
    parser.add_argument("--lanes", type=int, nargs="+", default=[4096])
    parser.add_argument("--batches", type=int, help="plan so many instead of one pass")
    parser.add_argument("--only", nargs="+", choices=("lanes", "groups", "streaming"))
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    worlds = {f"1 source of {n:,} shards": World([n], [1.0], options.batches) for n in options.shards}
    if options.sources:
        sizes = np.geomspace(20, 5000, options.sources).round().astype(int)
        weights = rng.uniform(0.1, 1, len(sizes)).tolist()
        worlds[f"{options.sources} weighted sources"] = World(sizes.tolist(), weights, options.batches)
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=f"global batch {BATCH}, {PER_SHARD} samples a shard, one pass")
    for column in ("world", "order", "nodes", "amplification", "variance ÷ iid", "shards a batch", "open a node", "s"):
        table.add_column(column, justify="left" if column in ("world", "order") else "right")
    runs: list[tuple[str, str, Callable[[], Iterator[np.ndarray]], list[int]]] = []
    for name, world in worlds.items():
        runs += [(name, f"lanes {most}", partial(lanes, world, most), options.nodes) for most in options.lanes]
        runs.append((name, "groups (before)", partial(groups, world), options.nodes))
        if len(world.weights) == 1:
            runs += [(name, "streaming py1e", partial(streaming, world, n), [n]) for n in options.nodes]
    runs = [run for run in runs if not options.only or run[1].split()[0] in options.only]
    for name, order, batches, nodes in track(runs, "planning", console=Console(stderr=True)):
        began = time.perf_counter()
        for n, found in measure(batches(), worlds[name], nodes).items():
            table.add_row(
                name,
                order,
                str(n),
                f"{found['amplification']:.3f}",
                f"{found['variance']:.2f}",
                f"{found['different']:,.0f}",
                f"{found['open']:,}" if "open" in found else "–",
                f"{time.perf_counter() - began:.0f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
