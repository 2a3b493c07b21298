"""Loading a checkpoint into the running engine, and its weights without one.

ddp, fsdp and hsdp write PyTorch's distributed checkpoint format; ZeRO writes DeepSpeed's files. A run continues from
either under any strategy and on any number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from stamo_dist.checkpoint import deepspeed_files, reshard
from stamo_dist.checkpoint.compatibility import sources_of
from stamo_dist.checkpoint.manifest import Checkpoint, CheckpointManifest, damage, damaged, read_checkpoint_manifest
from stamo_dist.checkpoint.writers import ZERO_TAG
from stamo_dist.distributed.dcp import read_dcp
from stamo_dist.distributed.engine import ZERO_STAGE, Engine
from stamo_dist.errors import CheckpointError
from stamo_dist.optim.ema import EMA
from stamo_dist.run.state import RunState


def holds_all(manifest: CheckpointManifest) -> bool:
    """Whether a checkpoint has every parameter, including frozen ones; DeepSpeed's files may lack those."""
    return manifest.strategy not in ZERO_STAGE


def load_checkpoint(
    checkpoint: Checkpoint,
    engine: Engine,
    ema: EMA | None,
    *,
    precision: str,
    sources: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> RunState:
    """Load weights, optimizer and average into the running engine; every process calls it.

    The files' checksums were verified by `verify_or_fall_back`. `sources`: the run's sources, if they may differ from
    the checkpoint's; samples seen are matched by name. `say` is called with notes for the user, on rank 0.

    Raises:
        CheckpointError: The checkpoint was written in another precision, holds another model, or cannot be read.
    """
    path, manifest = checkpoint
    if manifest.precision != precision:
        raise CheckpointError(
            f"{path}: saved in {manifest.precision}, the recipe says {precision}; set train.precision"
        )
    try:
        if reshard.needed(manifest, engine):
            note = reshard.load(path, manifest, engine)
            if engine.world.is_main:
                say(note)
        elif engine.is_zero:
            _load_zero(path, engine)
        else:
            _load_dcp(path / "dcp", engine)
        if ema is not None:
            ema.load(path / "ema")
    except (RuntimeError, ValueError, KeyError, CheckpointException) as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{path}: does not fit the model or optimizer of the recipe: {why}") from e
    state = copy.deepcopy(manifest.state)
    if sources is not None:
        for name in ("samples", "skipped"):
            counted = dict(zip(sources_of(manifest.recipe), getattr(state, name), strict=False))
            setattr(state, name, [counted.get(source, 0) for source in sources])
    return state


def _load_zero(path: Path, engine: Engine) -> None:
    shared = ZERO_STAGE[engine.strategy] == 3
    with deepspeed_files.loaded_safely(engine.deepspeed):
        module = None if shared else _load_untrained
        loaded, _ = engine.deepspeed.load_checkpoint(str(path), tag=ZERO_TAG, custom_load_fn=module)
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed could not read it")
    if not shared:
        engine.deepspeed.optimizer.update_lp_params()


def _load_untrained(*, src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a module's state that may hold only the names of trained weights; those are loaded from the fp32 copies."""
    trained = {n for n, p in dst.named_parameters(remove_duplicate=False) if p.requires_grad}
    named = {n for n, t in src.items() if n in trained and not t.numel()}
    wrong = dst.load_state_dict({n: t for n, t in src.items() if n not in named}, strict=False)
    if names := [*(set(wrong.missing_keys) - named), *wrong.unexpected_keys]:
        raise KeyError(f"missing or unknown parameters: {', '.join(sorted(names)[:5])}")


def _load_dcp(folder: Path, engine: Engine) -> None:
    inner = engine.inner_optimizer
    module, optimizer = get_state_dict(engine.unwrapped, inner)
    dcp.load({"module": module, "optimizer": optimizer}, checkpoint_id=folder)
    strict = StateDictOptions(strict=True)
    set_state_dict(engine.unwrapped, inner, model_state_dict=module, optim_state_dict=optimizer, options=strict)


def read_weights(path: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The trained module's full fp32 state dict from one checkpoint, without a process group.

    `ema`: take the moving average in place of the trained parameters, if the checkpoint has one.

    Raises:
        CheckpointError: It is incomplete, or a file is damaged.
    """
    manifest = read_checkpoint_manifest(path)
    if wrong := damage(path, manifest):
        raise damaged(path, wrong)
    if manifest.strategy in ZERO_STAGE:
        weights = reshard.read_zero(path, manifest)
    else:
        weights = read_dcp(path / "dcp", "module")
    if ema and (path / "ema").is_dir():
        weights.update({name: t.view(weights[name].shape) for name, t in EMA.read(path / "ema").items()})
    return weights
