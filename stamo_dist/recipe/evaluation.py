"""What a recipe says about measuring while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stamo_dist.recipe.data import Data
from stamo_dist.recipe.section import NonNegativeInt, PositiveInt, Section


class RolloutConfig(Section):
    """Closed-loop trials of a policy's saved weights beside its training; the options of `stamo eval rollout`."""

    benchmark: str | None = Field(None, description="Which simulator, e.g. metaworld; that of the data when omitted.")
    tasks: list[str] = Field(
        min_length=1, description="LIBERO: SUITE, SUITE/INDEX or SUITE/NAME; Meta-World: reach-v3, …"
    )
    trials: PositiveInt = Field(10, description="Trials of each task.")
    cameras: list[str] = Field(
        default_factory=list, description="What the policy sees, in the order of its views; as in training if empty."
    )
    size: PositiveInt | None = Field(None, description="Side of the frames; as in training when omitted.")
    actions: Literal["delta", "original", "openvla"] = Field("delta", description="What the policy's numbers mean.")
    unnorm_key: str | None = Field(
        None, description="Source whose statistics scale the actions; that of the task's suite or benchmark if omitted."
    )
    act_steps: PositiveInt | None = Field(None, description="Actions taken of a chunk; all when omitted.")
    max_steps: PositiveInt | None = Field(None, description="Steps of a trial; the benchmark's when omitted.")
    processes: PositiveInt | None = Field(
        None, description="Simulators at once; as cores and memory allow when omitted."
    )
    videos: NonNegativeInt = Field(1, description="Most videos kept of each task's successes, and of its failures.")
    where: Literal["process", "slurm"] = Field(
        "process", description="A process on the machine of rank 0, or a Slurm job under the training's profile."
    )
    device: str | None = Field(
        None,
        description="cpu or cuda; when omitted a process leaves the GPUs to the training, and a job takes its own.",
    )
    cluster: str | None = Field(
        None,
        description="where: slurm: the profile of the jobs; that which the training was submitted under if omitted.",
    )


class Evaluate(Section):
    """Small measurements while it trains, of a tokenizer or of a policy; they change nothing about the training."""

    every: PositiveInt | None = Field(
        None, description="Steps between them: a multiple of train.checkpoint.every, as saved weights are measured."
    )
    reconstruct: NonNegativeInt = Field(32, description="Of a tokenizer: frames of each source; 0: none.")
    probe: list[PositiveInt] = Field(
        default_factory=list, description="Frames between the two whose motion a small head reads; empty: no probe."
    )
    rollout: RolloutConfig | None = Field(None, description="Of a policy: trials in a simulator, beside the training.")

    @property
    def beside(self) -> RolloutConfig | None:
        """The rollout settings, if rollouts are made."""
        return self.rollout if self.every else None

    def holds_up(self, step: int) -> bool:
        """Whether training is blocked after `step` while rank 0 measures."""
        return bool(self.every and step and step % self.every == 0 and self.rollout is None)


def evaluate_problems(evaluate: Evaluate, stage: str, checkpoint_every: int, data: Data) -> list[str]:
    """Problems with the rest of the recipe."""
    problems = []
    rollout = evaluate.rollout
    if rollout is not None and stage != "policy":
        problems.append(
            f"evaluate.rollout: only a policy is rolled out, not what the {stage} stage trains; leave it out"
        )
    elif rollout is not None:
        problems += _rollout_problems(rollout, data)
    if evaluate.every is None:
        return problems
    if stage == "policy" and rollout is None:
        problems.append("evaluate.rollout: is missing, and evaluate.every rolls a policy out; give benchmark and tasks")
    if stage not in ("tokenizer", "policy"):
        problems.append(f"evaluate.every: a tokenizer or a policy is measured while it trains, not the {stage} stage")
    if evaluate.every % checkpoint_every:
        problems.append(
            f"evaluate.every: {evaluate.every} is no multiple of train.checkpoint.every ({checkpoint_every})"
        )
    return problems


def _rollout_problems(rollout: RolloutConfig, data: Data) -> list[str]:
    problems = []
    if rollout.cameras and len(rollout.cameras) != data.views:
        problems.append(f"evaluate.rollout.cameras: the policy looks at {data.views} views (data.views); name as many")
    if rollout.cluster is not None and rollout.where != "slurm":
        problems.append("evaluate.rollout.cluster: is the profile of Slurm jobs; set evaluate.rollout.where: slurm")
    return problems
