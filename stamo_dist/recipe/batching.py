"""How a global batch is spread over processes, virtual workers and micro-batches."""

from __future__ import annotations

from stamo_dist.recipe.section import Section
from stamo_dist.recipe.training import Train


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


def batching(train: Train, world_size: int) -> Batching:
    """Derive the per-process batch and the gradient accumulation for `world_size` processes.

    Raises:
        ValueError: `world_size` does not divide the global batch; the message lists the sizes that do.
    """
    if train.global_batch % world_size:
        fits = [w for w in range(1, train.global_batch + 1) if train.global_batch % w == 0]
        raise ValueError(
            f"train.global_batch: {train.global_batch} is not divisible by {world_size} processes; "
            f"it runs on {', '.join(map(str, fits))}"
        )
    per_rank, virtual = train.global_batch // world_size, train.virtual_workers
    if virtual and virtual % world_size:
        fits = [w for w in range(1, virtual + 1) if virtual % w == 0]
        raise ValueError(
            f"train.virtual_workers: {virtual} cannot be shared by {world_size} processes; it runs on "
            f"{', '.join(map(str, fits))}"
        )
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
