"""The policy's part of a recipe: OpenVLA or OpenVLA-OFT with or without world modelling, or a diffusion transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, model_validator

from stamo_dist.recipe.data import Data
from stamo_dist.recipe.section import Fraction, PositiveInt, Section, Weight

Bounds = Literal["q99", "minmax"]  # 1 % and 99 % quantiles, or the extremes


class Lora(Section):
    """Low-rank adapters (peft) in place of full fine-tuning of the towers, the projector and the language model."""

    rank: PositiveInt = Field(32, description="Rank of the adapters.")
    alpha: PositiveInt | None = Field(
        None, description="Scale of the adapters times rank; min(rank, 16) when omitted, as OpenVLA does."
    )
    dropout: Fraction = Field(0.0, description="Dropout in front of the adapters.")
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Ends of the names of the layers to adapt; all-linear adapts every trained one."
    )

    @property
    def scale(self) -> int:
        return min(self.rank, 16) if self.alpha is None else self.alpha


class Freeze(Section):
    """Which parts of the network keep their weights; what a checkpoint lacks of them trains all the same."""

    vision: bool = Field(False, description="Keep the vision towers as they are.")
    projector: bool = Field(False, description="Keep the projector as it is.")
    language: bool = Field(False, description="Keep the language model as it is.")


class WorldModel(Section):
    """A light head on the backbone that predicts what the chunk leads to: weight · (mse · MSE + l1 · L1)."""

    target: Literal["state", "motion", "dinov2"] = Field(
        "state", description="The next state, its difference to this one, or the next frame's raw DINOv2 patches."
    )
    weight: Weight = Field(1.0, description="λ_f, the weight of this loss beside policy.action_weight.")
    mse: Weight = Field(1.0, description="Share of the squared error; 0 leaves it out.")
    l1: Weight = Field(1.0, description="Share of the absolute error; 0 leaves it out.")
    width: PositiveInt = Field(1024, description="Hidden width of the head.")
    read: Literal["prompt", "actions"] = Field(
        "prompt",
        description="Hidden state it reads: the prompt's last one, or the mean of those the actions come from.",
    )

    @model_validator(mode="after")
    def _has_a_loss(self) -> WorldModel:
        if not self.weight * (self.mse + self.l1):
            raise ValueError("weight, mse and l1 leave no loss; set policy.world: null to train without the head")
        return self


class DiffusionTransformerConfig(Section):
    """A small policy in RDT's manner: a diffusion transformer over the action chunk, beside pseudo-actions of video."""

    width: PositiveInt = Field(256, description="Width of the transformer; heads must divide it.")
    depth: PositiveInt = Field(6, description="Transformer blocks; they look at the image and the text in turns.")
    heads: PositiveInt = Field(8, description="Attention heads.")
    timesteps: PositiveInt = Field(1000, description="Noise levels in training (cosine schedule).")
    sampler_steps: PositiveInt = Field(5, description="Steps of the DPM-Solver++ that draws a chunk.")
    vocabulary: PositiveInt = Field(
        512, description="Ids of the text tokenizer that is learnt from the instructions; a multiple of 64."
    )
    pseudo: Literal["none", "motion", "pixels"] = Field(
        "motion",
        description="What a video has for actions: StaMo's motion over the chunk, as many averaged pixel differences, "
        "or nothing.",
    )
    pseudo_per: Literal["chunk", "step"] = Field(
        "chunk",
        description="One motion over the chunk, or one beside each action, as in the paper; step needs cached states.",
    )
    pseudo_weight: Weight = Field(1.0, description="Weight of their loss beside policy.action_weight.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DiffusionTransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} must divide width {self.width}")
        if self.vocabulary % 64:
            raise ValueError(f"vocabulary: {self.vocabulary} is no multiple of 64")
        return self


class PolicyConfig(Section):
    """The network that turns images and an instruction into actions."""

    weights: str | None = Field(
        None, description="Folder or hub id (owner/name[@revision]) of OpenVLA or OpenVLA-OFT; random when omitted."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="Fields of OpenVLA's config.json that differ from openvla-7b's."
    )
    vision: Literal["fused", "dinov2", "stamo"] = Field(
        "fused", description="The checkpoint's own towers, its DINOv2 tower alone, or the frozen StaMo encoder."
    )
    stamo: Literal["patches", "states", "both"] = Field(
        "both", description="vision: stamo: read the encoder's patch features, the state tokens, or both."
    )
    tokenizer: str | None = Field(
        None,
        description="Run, export or hub id of the frozen StaMo tokenizer that vision: stamo and the world head need.",
    )
    views: PositiveInt = Field(1, description="Camera views of one moment, in the order of the source's cameras.")
    proprio: bool = Field(False, description="Add the robot's proprioception as one token.")
    actions: Literal["tokens", "parallel_tokens", "regression"] = Field(
        "tokens",
        description="Tokens one after the other (OpenVLA), all at once, or numbers all at once (OpenVLA-OFT).",
    )
    film: bool = Field(False, description="Condition the towers' blocks on the instruction (OpenVLA-OFT+).")
    bounds: Bounds = Field("q99", description="What becomes [-1, 1]: the 1 % and 99 % quantiles, or the extremes.")
    prompt: Literal["openvla", "v01"] = Field("openvla", description="The prompt's form; v01 is that of openvla-v01.")
    action_weight: Weight = Field(1.0, description="λ_a, the weight of the action loss.")
    lora: Lora | None = Field(
        None, description="Train adapters in place of the weights that were loaded; what starts at random trains whole."
    )
    freeze: Freeze = Freeze()
    world: WorldModel | None = Field(None, description="World modelling beside the actions; null trains without.")
    targets: Literal["online", "cached"] = Field(
        "online",
        description="States to predict (and see, with stamo: states): computed in the step, or by `stamo encode`.",
    )

    @model_validator(mode="after")
    def _film_needs_towers(self) -> PolicyConfig:
        if self.film and self.vision == "stamo":
            raise ValueError("film: the frozen StaMo encoder has no FiLM; set film: false or another vision")
        return self


class OpenVLAPolicyConfig(PolicyConfig):
    """OpenVLA or OpenVLA-OFT."""

    diffusion: None = None


def _as_omitted(value: Any, info: ValidationInfo) -> Any:
    """Accept only the default, as resolved recipes contain every field."""
    assert info.field_name is not None, "it validates fields"
    if value != PolicyConfig.model_fields[info.field_name].get_default(call_default_factory=True):
        raise ValueError("is of OpenVLA, and policy.diffusion trains another network; leave it out")
    return value


_OmittedNone = Annotated[None, BeforeValidator(_as_omitted)]


class DiffusionPolicyConfig(PolicyConfig):
    """A diffusion transformer. Fields of OpenVLA are kept at their defaults, because checkpoints record them."""

    weights: _OmittedNone = None
    config: Annotated[dict[str, Any], Field(max_length=0), BeforeValidator(_as_omitted)] = Field(default_factory=dict)
    actions: Annotated[Literal["tokens"], BeforeValidator(_as_omitted)] = "tokens"
    film: Annotated[Literal[False], BeforeValidator(_as_omitted)] = False
    prompt: Annotated[Literal["openvla"], BeforeValidator(_as_omitted)] = "openvla"
    lora: _OmittedNone = None
    world: _OmittedNone = None
    diffusion: DiffusionTransformerConfig = Field(
        DiffusionTransformerConfig(),
        description="A small diffusion transformer (RDT) in place of OpenVLA; null trains OpenVLA.",
    )


def _kind(value: Any) -> str:
    """The kind of a policy, determined by `policy.diffusion` alone."""
    diffusion = value.get("diffusion") if isinstance(value, Mapping) else getattr(value, "diffusion", None)
    return "openvla" if diffusion is None else "diffusion"


Policy = Annotated[
    Annotated[OpenVLAPolicyConfig, Tag("openvla")] | Annotated[DiffusionPolicyConfig, Tag("diffusion")],
    Discriminator(_kind),
]


def policy_problems(policy: Policy, data: Data) -> list[str]:
    """Problems of the rest of a recipe with its policy."""
    problems = []
    if not data.horizon:
        problems.append("data.horizon: a policy needs the actions of a chunk; set 1 for OpenVLA, 8 for OpenVLA-OFT")
    cached = policy.targets == "cached"
    if cached and data.augment.active:
        problems.append("policy.targets: cached states are of frames as they are; set online, or data.augment off")
    if cached and policy.world is not None and policy.world.target == "dinov2":
        problems.append("policy.targets: states are cached, raw DINOv2 patches are not; set policy.targets: online")
    if cached and policy.tokenizer is None:
        problems.append("policy.tokenizer: is missing, and policy.targets: cached are the states it gives")
    if isinstance(policy, DiffusionPolicyConfig):
        problems += _diffusion_problems(policy, data)
    if policy.world is not None and not data.target:
        problems.append("data.target: policy.world predicts from the frame at t + horizon; set data.target: true")
    if policy.tokenizer is None and (policy.world is not None or policy.vision == "stamo"):
        reader = "policy.world" if policy.world is not None else "policy.vision"
        problems.append(f"policy.tokenizer: is missing, and {reader} needs the run folder of a StaMo tokenizer")
    if policy.lora is not None and policy.weights is None:
        problems.append(
            "policy.lora: adapts the weights that policy.weights names, in place of which init_from is not taken; name "
            "some (of a run: RUN/model), or set policy.lora: null"
        )
    frozen = [name for name in Freeze.model_fields if getattr(policy.freeze, name)]
    if frozen and policy.weights is None:
        problems.append(
            f"policy.freeze.{frozen[0]}: without policy.weights it would keep what was drawn at random; name some, or "
            "set it to false"
        )
    pseudo = policy.diffusion is not None and policy.diffusion.pseudo != "none" and policy.diffusion.pseudo_weight > 0
    if not policy.action_weight and policy.world is None and not pseudo:
        problems.append("policy.action_weight: 0, and there is no other loss to train by; raise it")
    if policy.views != data.views:
        problems.append(f"policy.views: {policy.views}, but data.views reads {data.views}; give both the same number")
    if data.latents == "cached":
        problems.append("data.latents: a policy reads frames, not a VAE's latents; set data.latents: online")
    if not any(source.actions for source in data.used.values()):
        problems.append("data.sources: all of them are video (actions: false); a policy needs actions of one at least")
    for name, source in data.used.items():
        if source.actions and source.horizon not in (None, data.horizon):
            problems.append(
                f"data.sources.{name}.horizon: {source.horizon}, but a policy predicts {data.horizon} actions "
                "(data.horizon); leave it out, or set actions: false to read the source as video"
            )
    return problems


def _diffusion_problems(policy: DiffusionPolicyConfig, data: Data) -> list[str]:
    diffusion, problems = policy.diffusion, []
    if policy.vision != "stamo":
        problems.append("policy.vision: the diffusion policy sees through the StaMo encoder; set vision: stamo")
    if policy.stamo == "both":
        problems.append("policy.stamo: the diffusion policy reads one kind of tokens; set patches or states")
    if diffusion.pseudo != "none" and not data.target:
        problems.append("data.target: pseudo-actions come from the frame at t + horizon; set data.target: true")
    if diffusion.pseudo_per == "step" and diffusion.pseudo != "none":
        problems += _step_problems(policy, data)
    of_use = diffusion.pseudo == "motion" or (diffusion.pseudo == "none" and policy.stamo == "states")
    if policy.targets == "cached" and not of_use:
        problems.append(f"policy.targets: pseudo: {diffusion.pseudo} needs no states; set policy.targets: online")
    return problems


def _step_problems(policy: DiffusionPolicyConfig, data: Data) -> list[str]:
    """Problems that prevent one pseudo-action per action of a chunk."""
    problems = []
    if policy.diffusion.pseudo == "pixels":
        problems.append("policy.diffusion.pseudo_per: step has motions only; set pseudo: motion, or pseudo_per: chunk")
    elif policy.targets != "cached":
        problems.append(
            "policy.diffusion.pseudo_per: step needs the states of every frame of the chunk, too many to encode in the "
            "step; run `stamo encode` and set policy.targets: cached, or pseudo_per: chunk"
        )
    problems += [
        f"data.sources.{name}.horizon: {source.horizon}, but with pseudo_per: step a motion must last as long as an "
        "action everywhere; leave it out and convert the source with --rate"
        for name, source in data.used.items()
        if source.horizon not in (None, data.horizon)
    ]
    return problems
