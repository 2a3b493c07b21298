"""Building the engine of a strategy: the only module that distinguishes DeepSpeed, FSDP and DDP."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
)
from torch import nn

from stamo_dist.device import Device
from stamo_dist.distributed.collectives import PATIENCE
from stamo_dist.distributed.engine import ZERO_STAGE, Engine
from stamo_dist.distributed.rank import World
from stamo_dist.errors import RunError
from stamo_dist.recipe.batching import Batching
from stamo_dist.recipe.training import Strategy

_log = logging.getLogger(__name__)
#: Numbers that ZeRO reduces at once.
REDUCE_BUCKET = 200_000_000
#: Takes modules without memory, which are filled once they are sharded.
SUPPORTS_META_INIT = {"fsdp", "hsdp"}


def _compile_nothing() -> None:
    """On a CPU DeepSpeed compiles collectives, for minutes at a machine's first start; only inference calls them."""
    backend: Any = import_module("deepspeed.comm.torch")  # deepspeed.comm's own attribute of this name is PyTorch
    backend.build_shm_op = lambda: None


def _deepspeed_config(stage: int, batching: Batching, clip: float | None, precision: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": batching.micro_batch,
        "gradient_accumulation_steps": batching.accumulation,
        "gradient_clipping": clip or 0.0,  # DeepSpeed clips only if its own config says so
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": Device.current().is_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": REDUCE_BUCKET,
        },
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def _fsdp_plugin(strategy: Strategy, precision: str, block_classes: Sequence[str]) -> FullyShardedDataParallelPlugin:
    policy = None
    if precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Inputs keep their dtype: the noise level must reach the model in fp32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=strategy.reshard_after_forward,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(block_classes),
        mixed_precision_policy=policy,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )


@dataclass(frozen=True)
class EngineSpec:
    """The settings that determine how a module is distributed and trained.

    `clip`: maximum gradient norm, None for no clipping. `block_classes` names the transformer block classes that
    FSDP shards one by one.
    """

    strategy: Strategy
    world: World
    batching: Batching
    clip: float | None
    precision: str
    block_classes: Sequence[str]

    def connect(self) -> Accelerator:
        """Initialise the process group; the first half of `build`, which takes the returned accelerator.

        Raises:
            RunError: hsdp's group does not divide the world.
        """
        with _local_rank_of_device(self.world):
            return self._connect()

    def _connect(self) -> Accelerator:
        device = Device.current()
        for note in device.tune(self.precision):
            _log.warning(note)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        common: dict[str, Any] = {
            "gradient_accumulation_steps": self.batching.divisor,
            "mixed_precision": "bf16" if self.precision == "bf16" else "no",
            "kwargs_handlers": [
                InitProcessGroupKwargs(backend=device.backend, timeout=timedelta(seconds=PATIENCE)),
                # SD3's position table is a buffer of 226 MB that never changes.
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
            "step_scheduler_with_optimizer": False,
        }
        if self.strategy.name in ZERO_STAGE:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            _compile_nothing()
            config = _deepspeed_config(ZERO_STAGE[self.strategy.name], self.batching, self.clip, self.precision)
            # cpu=True would silently drop DeepSpeed; an unnamed backend would make every process a world of one.
            accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), **common)
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # takes a second

            # Under zero3 transformers would spread every model that is built from now on over the processes, with
            # collectives: also one that a single process builds, as an export does. The engine spreads what is trained.
            unset_hf_deepspeed_config()
            return accelerator

        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        if self.strategy.name == "ddp":
            return Accelerator(cpu=not device.is_gpu, **common)

        plugin = _fsdp_plugin(self.strategy, self.precision, self.block_classes)
        mesh = _hsdp_mesh(self.strategy, self.world) if self.strategy.name == "hsdp" else None
        if device.is_gpu:
            return Accelerator(fsdp_plugin=plugin, parallelism_config=mesh, **common)
        accelerator = Accelerator(cpu=True, **common)  # Accelerate knows no FSDP on CPU; its prepare does
        # Accelerate's prepare copies this one into the other.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        if mesh is not None:
            accelerator.state.parallelism_config = mesh
            accelerator.state.device_mesh = mesh.build_device_mesh("cpu")
        return accelerator

    def give_memory(self, module: nn.Module, accelerator: Accelerator) -> None:
        """Before `build`, where it takes no modules without memory: whole on the device, or in zero3's shares.

        What is in the parameters that had none must be written afterwards.
        """
        from stamo_dist.models.shards import materialise, share_out  # with it come diffusers and transformers

        if self.strategy.name == "zero3":
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            share_out(module, _deepspeed_config(3, self.batching, self.clip, self.precision), dtype, accelerator.device)
        else:
            materialise(module, accelerator.device)

    def build(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator | None = None
    ) -> Engine:
        """Distribute `module` and `optimizer` over the processes.

        All processes must hold the same initial weights. `accelerator`: from `connect`, if the processes had to
        communicate before. Under a strategy of `SUPPORTS_META_INIT` parameters may be on the meta device: only this
        process's shards get memory, which must be filled afterwards. The streaming loader is not passed here:
        Accelerate would read on rank 0 for all, one batch ahead.

        Raises:
            RunError: hsdp's group does not divide the world.
        """
        accelerator = accelerator or self.connect()
        names = {p: name for name, p in module.named_parameters()}
        groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        on_meta = any(p.is_meta for p in names)
        if self.strategy.name != "ddp":
            # Sharding does not accept parameters with another memory order, such as channels-last.
            for parameter in names:
                # 1 × 1 convolutions have other strides too, but is_contiguous() lets them pass.
                if parameter.stride() != torch.empty(parameter.shape, device="meta").stride():
                    plain = torch.empty_like(parameter.data, memory_format=torch.contiguous_format)
                    parameter.data = plain.copy_(parameter.data)
        del names
        with _local_rank_of_device(self.world):
            module, optimizer = accelerator.prepare(module, optimizer)
        if on_meta:
            from stamo_dist.models.shards import materialise  # imports diffusers and transformers

            materialise(module, accelerator.device)
            # Accelerate matches the optimizer's parameters by address, which meta parameters lack.
            parameters = dict(module.named_parameters())
            for group, members in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = [parameters[name] for name in members]
        parts = (self.strategy.name, self.world, accelerator, module, optimizer, self.clip)
        if self.batching.virtual is None:
            return Engine(*parts, whole_gradients=self.strategy.gradients == "whole")
        from stamo_dist.distributed.deterministic import DeterministicEngine

        workers = self.batching.workers
        return DeterministicEngine(*parts, workers=workers, micro_batches=self.batching.accumulation // workers)


@contextlib.contextmanager
def _local_rank_of_device(world: World) -> Iterator[None]:
    """Accelerate's DDP and DeepSpeed take LOCAL_RANK for the GPU's number: where each process sees one, that is 0."""
    before = os.environ.get("LOCAL_RANK")
    if before is not None:
        os.environ["LOCAL_RANK"] = str(Device.current().number_of(world.local_rank))
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def _hsdp_mesh(strategy: Strategy, world: World) -> ParallelismConfig:
    group = strategy.shard_group or world.local_size
    if world.size % group:
        raise RunError(f"strategy.shard_group: {group} does not divide {world.size} processes")
    if group == 1 < world.size:
        raise RunError(
            "hsdp with one process a node shards nothing: set strategy.shard_group to 2 or more, or strategy.name: ddp"
        )
    return ParallelismConfig(dp_replicate_size=world.size // group, dp_shard_size=group)
