"""What a recipe says of the training itself: optimizer, schedule, checkpoints, strategy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.recipe.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section


class Optimizer(Section):
    """AdamW with warm-up."""

    lr: PositiveFloat = Field(1e-4, description="Peak learning rate.")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's moment decays.")
    eps: PositiveFloat = Field(1e-8, description="AdamW's ε.")
    encoder_lr: PositiveFloat = Field(
        1.0, description="Learning rate of the encoder and compressor relative to the decoder's."
    )
    encoder_start: NonNegativeInt = Field(
        0, description="Step after which the encoder and compressor learn; a random decoder first learns to read them."
    )
    lr_scale: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description="Beginning of parameters' names → their learning rate relative to lr, e.g. {world_head: 10}; "
        "the longest one that fits counts.",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.01, description="Decoupled weight decay on matrices; biases, norms and queries have none."
    )
    warmup_steps: NonNegativeInt = Field(1000, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"] = Field(
        "cosine",
        description="After the warm-up; wsd is stable, then falls linearly over decay_steps: train it on or branch off "
        "a decay (`stamo train --branch`) at any step.",
    )
    final_lr: Fraction = Field(
        0.1, description="Learning rate at the end of cosine, linear and wsd, relative to the peak."
    )
    decay_steps: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="wsd: last steps, or share of all, in which it falls."
    )
    schedule_from: Literal["begin", "here"] = Field(
        "begin",
        description="A schedule changed on the way (also by train.steps) counts from the run's begin, or starts at the "
        "rate reached, which is its peak.",
    )
    clip: PositiveFloat | None = Field(1.0, description="Largest gradient norm; null turns clipping off.")

    def decay_of(self, steps: int) -> int:
        """Steps of wsd's decay in a run of so many."""
        return self.decay_steps if isinstance(self.decay_steps, int) else max(1, round(self.decay_steps * steps))


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: PositiveInt = Field(1000, description="Steps between checkpoints; the last step is always saved.")
    keep: PositiveInt = Field(3, description="How many of the newest checkpoints to keep.")
    keep_every: PositiveInt | None = Field(
        None, description="Save every so many steps and never remove that one; null: none is kept for ever."
    )
    ephemeral_every: PositiveInt | None = Field(
        None, description="Steps between saves of which only the newest is kept; null turns them off."
    )
    background: bool = Field(
        False, description="Write while training goes on; it stands still only for a copy into host memory."
    )
    grace_seconds: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Seconds the cluster gives a run between asking it to stop and killing it; null: unknown."
    )


class ProfileSettings(Section):
    """A trace of a few steps of rank 0, in RUN/profile."""

    start: PositiveInt = Field(10, description="Steps before the first that is traced; a compiled model is warm then.")
    steps: PositiveInt = Field(3, description="How many are traced.")
    memory: bool = Field(False, description="Also a snapshot of the GPU's memory, with the stack of each allocation.")


class Alarms(Section):
    """Which steps are spikes; they are said in the log, in metrics.jsonl and by `stamo status`, and nothing else."""

    window: Annotated[int, Field(ge=10)] = Field(200, description="Logged steps that a step is compared with.")
    deviations: PositiveFloat = Field(
        10.0, description="Robust deviations above their median at which loss or gradient norm is a spike."
    )


class Train(Section):
    """The schedule of one run."""

    steps: PositiveInt = Field(description="Optimizer steps in all.")
    global_batch: PositiveInt | dict[NonNegativeInt, PositiveInt] = Field(
        256,
        description="Samples per optimizer step over all processes; {0: 256, 20_000: 1024}: changes at that step.",
    )
    micro_batch: PositiveInt = Field(
        32, description="Most samples one process puts through the model at once; accumulation is derived."
    )
    virtual_workers: PositiveInt | None = Field(
        None,
        description="A power of two: losses are the same to the bit on 1, 2, 4, … up to so many processes; ddp only.",
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="Arithmetic of the model; states stay fp32.")
    gradient_checkpointing: bool | PositiveInt = Field(
        False,
        description="Recompute block activations in the backward pass: of all blocks (true), or of one in 2, 3, ….",
    )
    compile: bool = Field(False, description="torch.compile the DiT block by block and the frozen parts.")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Decay of an exponential moving average of the trained weights; null keeps none."
    )
    log_every: PositiveInt = Field(1, description="Steps between lines in metrics.jsonl.")
    log_samples: bool = Field(
        False, description="Write samples.jsonl: which samples each step read, and a checksum of each."
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    max_bad_steps: PositiveInt = Field(
        10, description="Steps in a row without a finite loss and gradient after which the run is rolled back, once."
    )
    alarms: Alarms | None = Field(Alarms(), description="Spikes of loss and gradient norm; null looks for none.")
    step_timeout: PositiveFloat = Field(
        1800.0, description="Seconds without progress after which the run counts as hung and leaves with code 75."
    )
    setup_timeout: PositiveFloat = Field(3600.0, description="The same for building, the first step and leaving.")
    save_timeout: PositiveFloat = Field(3600.0, description="The same for what a checkpoint holds the steps up.")
    evaluate_timeout: PositiveFloat = Field(3600.0, description="The same for one measurement between steps.")
    export_timeout: PositiveFloat = Field(3600.0, description="The same for writing the model at the end.")
    profile: ProfileSettings | None = Field(None, description="Trace a few steps; null traces none.")
    sync_guard: Literal["off", "warn", "error"] = Field(
        "off",
        description="On a GPU, in the steps after a start's first: what PyTorch does where the host waits for the "
        "device, but for the gradient's norm. Of zero1–3, whose DeepSpeed waits by itself, error ends the run.",
    )
    dry_export: bool | None = Field(
        None, description="Export once after the third step, to fail early; null: where training takes over an hour."
    )

    @field_validator("global_batch")
    @classmethod
    def _in_order_from_zero(cls, global_batch: Any) -> Any:
        if isinstance(global_batch, dict) and (0 not in global_batch or list(global_batch) != sorted(global_batch)):
            given = ", ".join(map(str, global_batch)) or "none"
            raise ValueError(f"steps must increase from 0, as in {{0: 256, 20_000: 1024}}, unlike {given}")
        return global_batch

    @property
    def batches(self) -> BatchSizes:
        return BatchSizes.of(self.global_batch)

    @property
    def samples(self) -> int:
        """Samples of the whole run."""
        return self.batches.before(self.steps)

    @property
    def recompute(self) -> int:
        """One block of so many keeps no activations: 1 is all of them, 0 none."""
        return int(self.gradient_checkpointing)


#: Above this number of processes, shards of a block are so small (1 MB for a 7 B model at 400) that gathering them is
#: dominated by latency.
MANY_PROCESSES = 256


class Strategy(Section):
    """How the trained module is spread over processes."""

    name: Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"] = Field(
        "zero2", description="ddp, DeepSpeed ZeRO stage 1–3, PyTorch FSDP2, or its hybrid (sharded inside a group)."
    )
    shard_group: PositiveInt | None = Field(
        None, description="hsdp: processes that share one sharded copy; those of one node when omitted."
    )
    gradients: Literal["sharded", "whole"] = Field(
        "sharded",
        description="fsdp, hsdp, between the micro-batches of a step: each gradient is reduced and sharded at once, or "
        "stays whole in fp32 on every device until the last, which reduces once.",
    )

    reshard_after_forward: bool = Field(
        True,
        description="fsdp, hsdp: give a block's gathered weights back after its forward pass and gather them again for "
        "its backward pass; false keeps all of them between, for half the gathering.",
    )

    def check_processes(self, processes: int) -> None:
        """Raises: ValueError: hsdp's groups cannot be made of so many processes."""
        if self.name == "hsdp" and self.shard_group and processes % self.shard_group:
            raise ValueError(f"strategy.shard_group: {self.shard_group} does not divide {processes} processes")

    def advice(self, processes: int) -> list[str]:
        """Advice for this number of processes."""
        if self.name != "fsdp" or processes <= MANY_PROCESSES:
            return []
        return [
            f"strategy.name: fsdp gathers every block over all {processes} processes; hsdp gathers within a node (or "
            "strategy.shard_group) and has gradients alone go farther"
        ]


def training_problems(train: Train, optimizer: Optimizer, strategy: Strategy, stage: str) -> list[str]:
    """Problems: training fields that contradict each other, or have no effect in the stage."""
    problems = []
    if optimizer.schedule == "wsd" and (decay := optimizer.decay_of(train.steps)) > train.steps:
        problems.append(f"optimizer.decay_steps: {decay} are more than train.steps ({train.steps})")
    if strategy.name == "hsdp" and strategy.shard_group == 1:
        problems.append("strategy.shard_group: a group of 1 shards nothing; set it to 2 or more, or strategy.name: ddp")
    if strategy.gradients == "whole" and strategy.name not in ("fsdp", "hsdp"):
        problems.append(f"strategy.gradients: is of fsdp and hsdp; {strategy.name} would ignore it")
    if not strategy.reshard_after_forward and strategy.name not in ("fsdp", "hsdp"):
        problems.append(f"strategy.reshard_after_forward: is of fsdp and hsdp; {strategy.name} would ignore it")
    if virtual := train.virtual_workers:
        if strategy.name != "ddp":
            problems.append(f"train.virtual_workers: needs strategy.name: ddp, not {strategy.name}")
        if virtual & (virtual - 1) or any(size % virtual for size in train.batches.sizes):
            problems.append(
                f"train.virtual_workers: {virtual} is not a power of two that divides train.global_batch "
                f"({train.batches})"
            )
    if stage == "vae":
        problems += [
            f"train.{name}: is of the tokenizer and policy stages, and the vae stage would ignore it; set it to false"
            for name in ("compile", "gradient_checkpointing")
            if getattr(train, name)
        ]
    elif train.compile and strategy.name == "zero3":
        problems.append(
            "train.compile: zero3 gathers each layer's weights in hooks, which torch.compile would compile one by one "
            "and give up on; set it to false, or strategy.name: fsdp, hsdp, zero2, zero1 or ddp"
        )
    return problems
