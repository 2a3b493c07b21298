"""The interface between a training stage and the loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from stamo_dist.data.loader import Batch, CachedStates
from stamo_dist.errors import CheckpointError
from stamo_dist.export_layout import WHOLE, ExportLayout
from stamo_dist.tasks.noise import StepNoise


@dataclass
class LossOutput:
    """`loss`: the scalar to differentiate, the mean of the first term. `per_sample`: term → (B,).

    `present`: term → (B,) bool, samples that have the term, for terms that some samples lack; those values are 0.
    """

    loss: Tensor
    per_sample: dict[str, Tensor]
    present: Mapping[str, Tensor] = field(default_factory=dict)


class Task(Protocol):
    """One stage; the loop uses it only through this interface."""

    terms: tuple[str, ...]  # names of the logged losses; the first is the one that is minimised
    trained: nn.Module  # the module that the strategy wraps
    block_classes: tuple[str, ...]  # transformer blocks that FSDP shards one by one
    init_frames: int  # number of training frames for `initialise`; 0: it need not be called
    latents: str | None  # fingerprint of the VAE whose cached latents it reads, if any
    states: CachedStates | None  # the cached states it reads, if any
    notes: tuple[str, ...]  # notes for the user on how the model was built
    sources: Mapping[str, str]  # recipe field → location of its weights: a path, or OWNER/NAME@COMMIT of the hub

    @property
    def frozen(self) -> Mapping[str, str]:
        """Fingerprint of each frozen part that is not in checkpoints, as loaded."""

    def initialise(self, frames: Tensor) -> None:
        """Fit data-dependent parts to `init_frames` training frames, uint8 (N, H, W, 3), the same on every process."""

    def load_weights(self) -> None:
        """Read the weights deferred when building `trained`, each process into its own shards."""

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and cast the frozen parts, which the strategy does not handle."""

    def loss(self, module: nn.Module, batch: Batch, noise: StepNoise) -> LossOutput:
        """Loss of one micro-batch. `module` is the wrapped `trained`."""

    def flops_per_sample(self) -> float:
        """FLOPs of one training sample: 3 × trained forward + 1 × frozen forward."""

    def export(
        self, folder: Path, weights: dict[str, Tensor], batches: Iterable[Batch], layout: ExportLayout = WHOLE
    ) -> None:
        """Write the usable model from the whole state dict of `trained`; `batches`: training data for fitting.

        Raises:
            RecipeError: The model cannot be written in that form.
        """


def load_trained(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights into a new `Task.trained`; meta parameters take over the loaded tensors.

    Frozen parameters may be missing (ZeRO-1 does not save them): they keep their initial values.

    Raises:
        CheckpointError: A trained parameter or a buffer is missing, or there are unknown ones.
    """
    on_meta = any(p.is_meta for p in module.parameters())
    missing, unexpected = module.load_state_dict(weights, strict=False, assign=on_meta)
    fixed = {name for name, p in module.named_parameters() if not p.requires_grad and not p.is_meta}
    bad = sorted(set(missing) - fixed) + unexpected
    if bad:
        raise CheckpointError(f"the checkpoint does not fit the model of the recipe: {', '.join(bad[:10])}")
