"""Reading DeepSpeed's files: tensors, plain values and a few of its classes; other pickles are refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stamo_dist.errors import CheckpointError


def load(file: str | Path, *, mmap: bool = False) -> Any:
    """Load a file written by DeepSpeed, on the CPU.

    Raises:
        CheckpointError: It holds classes that DeepSpeed does not store.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
        except pickle.UnpicklingError as e:
            raise CheckpointError(
                f"{file}: holds what DeepSpeed does not store there ({str(e).splitlines()[0]})"
            ) from e


@contextmanager
def loaded_safely(module: Any) -> Iterator[None]:
    """Inside, DeepSpeed's engine module `module` reads its files with `load`."""
    engine = module.checkpoint_engine
    engine.load = lambda path, map_location=None: load(path)
    try:
        yield
    finally:
        del engine.load
