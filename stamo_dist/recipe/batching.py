"""How a global batch is spread over processes, virtual workers and micro-batches."""

from __future__ import annotations

from math import gcd

from stamo_dist.recipe.section import Section
from stamo_dist.recipe.training import Train

_MOST = 1 << 16  # processes that a message names


class Batching(Section):
    """How a global batch is spread over processes and micro-batches."""

    world_size: int
    per_rank: int
    micro_batch: int
    accumulation: int
    virtual: int | None = None  # virtual workers of all processes

    @property
    def workers(self) -> int:
        """Virtual workers of one process."""
        return 1 if self.virtual is None else self.virtual // self.world_size

    @property
    def global_batch(self) -> int:
        return self.world_size * self.per_rank

    @property
    def divisor(self) -> int:
        """Number by which each loss is divided: with virtual workers gradients are summed over the processes."""
        return self.accumulation * (self.world_size if self.virtual else 1)

    def __str__(self) -> str:
        return f"{self.global_batch} = {self.world_size} × {self.accumulation} × {self.micro_batch}"


def batchings(train: Train, world_size: int) -> list[Batching]:
    """Derive the per-process batch and the gradient accumulation of each phase of the run for `world_size` processes.

    Raises:
        ValueError: `world_size` does not divide each global batch; the message lists the sizes that do.
    """
    sizes, virtual = train.batches, train.virtual_workers
    for start, size in zip(sizes.starts, sizes.sizes, strict=True):
        if not size % world_size:
            continue
        since = f" (after step {start})" if start else ""
        raise ValueError(
            f"train.global_batch: {size}{since} is not divisible by {world_size} processes; "
            f"it runs on {', '.join(map(str, _divisors(gcd(*sizes.sizes))))}"
        )
    if virtual and virtual % world_size:
        raise ValueError(
            f"train.virtual_workers: {virtual} cannot be shared by {world_size} processes; it runs on "
            f"{', '.join(map(str, _divisors(virtual)))}"
        )
    return [_batching(train, size, world_size) for size in sizes.sizes]


def described(train: Train, spreads: list[Batching]) -> str:
    """All of `batchings` on one line."""
    phases = zip(spreads, train.batches.starts, strict=True)
    return ", ".join(f"{spread} after step {at}" if at else str(spread) for spread, at in phases)


def batching(train: Train, world_size: int) -> Batching:
    """The first of `batchings`.

    Raises:
        ValueError: As there.
    """
    return batchings(train, world_size)[0]


def _batching(train: Train, size: int, world_size: int) -> Batching:
    per_rank, virtual = size // world_size, train.virtual_workers
    workers = virtual // world_size if virtual else 1
    each = per_rank // workers
    parts = next(k for k in range(1, each + 1) if each % k == 0 and each // k <= train.micro_batch)
    return Batching(
        world_size=world_size,
        per_rank=per_rank,
        micro_batch=each // parts,
        accumulation=parts * workers,
        virtual=virtual,
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, _MOST) + 1) if number % n == 0]
