"""What a recipe may say. Every field carries its own one-line documentation (`stamo recipe explain FIELD`).

Imports no torch, so that a login node validates recipes with pydantic alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stamo_dist.recipe.data import Data, data_problems
from stamo_dist.recipe.evaluation import Evaluate, evaluate_problems
from stamo_dist.recipe.init_from import InitialWeights, initial_problems
from stamo_dist.recipe.policy import OpenVLAPolicyConfig, Policy, policy_problems
from stamo_dist.recipe.run_name import check_name
from stamo_dist.recipe.section import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from stamo_dist.recipe.training import Optimizer, Strategy, Train, training_problems

#: In the context of a validation: whether the sections fit together is not checked.
SECTIONS_ALONE = "sections_alone"


class EncoderConfig(Section):
    """The feature extractor in front of the compressor: DINOv2 (transformers' Dinov2Model), also with registers."""

    weights: str | None = Field(
        None, description="DINOv2: a folder, .pth or .safetensors file, or hub id (owner/name[@revision]); else random."
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="Dinov2Config fields; beside weights they must be theirs."
    )
    image_size: PositiveInt = Field(224, description="Frames are resized to this square before the encoder.")
    train: bool = Field(False, description="Train the encoder jointly; the paper keeps it frozen.")
    output: Literal["patches", "cls"] = Field(
        "patches", description="What the compressor sees: the patch tokens, or, as a baseline, the [CLS] token alone."
    )

    @model_validator(mode="after")
    def _frozen_random_encoder_is_useless(self) -> EncoderConfig:
        if self.weights is None and not self.train:
            raise ValueError("an encoder without weights must be trained: set model.encoder.weights or train: true")
        return self


class CompressorConfig(Section):
    """Learnable queries that attend to the patch tokens and become the state."""

    tokens: PositiveInt = Field(2, description="State tokens per image.")
    dim: PositiveInt = Field(1024, description="Dimension of one state token.")
    width: PositiveInt = Field(1024, description="Hidden width of the compressor.")
    depth: PositiveInt = Field(4, description="Transformer layers.")
    heads: PositiveInt = Field(16, description="Attention heads; must divide width.")
    standardise: NonNegativeInt = Field(
        0, description="Training frames on which the initial states are standardised per dimension; 0 leaves them."
    )
    noise: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Deviation of the noise on the states in training (their own is 1): frames that look alike get "
        "near states, and motions in proportion to what moved.",
    )
    whiten: bool = Field(
        False,
        description="With standardise: decorrelate the initial states too, so that what differs little counts as much.",
    )

    norm: bool = Field(True, description="End with a LayerNorm of each token, which puts the states on a sphere.")
    straighten: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of a second loss: what a linear map of the state alone leaves of the latents."
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> CompressorConfig:
        if self.width % self.heads:
            raise ValueError(f"model.compressor.heads: {self.heads} must divide width {self.width}")
        if self.whiten and self.standardise <= self.dim:
            raise ValueError(f"model.compressor.whiten: needs standardise frames, more than dim ({self.dim})")
        return self


class DecoderConfig(Section):
    """The Diffusion Transformer (diffusers' SD3Transformer2DModel), conditioned on the state tokens."""

    weights: str | None = Field(
        None,
        description="Stable Diffusion 3: folder or hub id (owner/name[@revision]), or its single file; else random.",
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="SD3Transformer2DModel fields; beside weights they must be theirs."
    )
    precondition: bool = Field(
        False, description="Add the linear part of the velocity analytically; for a decoder without weights."
    )

    @model_validator(mode="after")
    def _pretrained_decoders_predict_velocity(self) -> DecoderConfig:
        if self.weights is not None and self.precondition:
            raise ValueError("precondition: pretrained weights predict the whole velocity; set precondition: false")
        return self


class VAEConfig(Section):
    """Pixels ↔ latents (diffusers' AutoencoderKL), frozen while the tokenizer trains."""

    weights: str | None = Field(
        None,
        description="As the decoder's, or a folder or hub id of its own, or the run folder of a finished vae stage.",
    )
    config: dict[str, Any] = Field(
        default_factory=dict, description="AutoencoderKL fields; beside weights they must be theirs."
    )
    latent: Literal["mean", "sample"] = Field("mean", description="Take the posterior's mean or a sample of it.")
    kl_weight: Annotated[float, Field(ge=0)] = Field(1e-6, description="vae stage: weight of the KL term.")
    l1_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="vae stage: weight of |x − x̂|.")
    mse_weight: Annotated[float, Field(ge=0)] = Field(1.0, description="vae stage: weight of (x − x̂)².")


class Model(Section):
    """The diffusion autoencoder: encoder → compressor → tokens → DiT → VAE."""

    encoder: EncoderConfig = EncoderConfig(train=True)
    compressor: CompressorConfig = CompressorConfig()
    decoder: DecoderConfig = DecoderConfig()
    vae: VAEConfig = VAEConfig()


class Flow(Section):
    """Flow matching as in Stable Diffusion 3: z_σ = (1−σ)·z₀ + σ·ε, velocity target ε − z₀."""

    sigma: Literal["logit_normal", "uniform"] = Field("logit_normal", description="How σ is drawn in training.")
    mean: float = Field(0.0, description="Mean of the logit-normal.")
    std: PositiveFloat = Field(1.0, description="Standard deviation of the logit-normal.")
    shift: PositiveFloat = Field(1.0, description="SD3's resolution shift of σ, in training and in sampling.")
    sampler_steps: PositiveInt = Field(28, description="Steps of the Euler sampler when decoding.")


class Tracking(Section):
    """Weights & Biases, TensorBoard. metrics.jsonl is written first and always."""

    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="offline needs no key and can be synced later with `wandb sync`."
    )
    tensorboard: bool = Field(False, description="Write RUN/tensorboard; needs the extra tensorboard.")
    project: str = Field("stamo-dist", description="W&B project.")
    entity: str | None = Field(None, description="W&B entity.")
    tags: list[str] = Field(default_factory=list, description="W&B tags.")


class Recipe(Section):
    """One run: data, model, schedule, strategy."""

    name: str = Field("", description="Name of the run; the recipe's file name when omitted.")
    stage: Literal["tokenizer", "vae", "policy"] = Field("tokenizer", description="What is trained.")
    run_dir: str = Field("", description="The run folder; runs/NAME when omitted.")
    seed: NonNegativeInt = Field(0, description="Seed of initialisation, sample order, augmentation and noise.")
    init_from: InitialWeights = Field(
        None, description="Another run or a model whose weights this one begins with: a path, or a map."
    )
    data: Data
    model: Model = Model()
    flow: Flow = Flow()
    policy: Policy = Field(
        OpenVLAPolicyConfig(), description="The network that turns images and an instruction into actions."
    )
    optimizer: Optimizer = Optimizer()
    train: Train
    strategy: Strategy = Strategy()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()

    @field_validator("name")
    @classmethod
    def _below_runs(cls, name: str) -> str:
        return check_name(name)

    @model_validator(mode="after")
    def _fields_agree(self, info: ValidationInfo) -> Recipe:
        if info.context and info.context.get(SECTIONS_ALONE):
            return self
        problems = data_problems(self.data, self.stage, self.model.vae.latent)
        problems += training_problems(self.train, self.optimizer, self.strategy, self.stage)
        if self.data.views > 1 and self.stage != "policy":
            problems.append(
                f"data.views: only a policy looks at {self.data.views} cameras of a moment; set data.views: 1"
            )
        problems += evaluate_problems(self.evaluate, self.stage, self.train.checkpoint.every, self.data)
        if self.stage == "policy":
            problems += policy_problems(self.policy, self.data)
        if self.init_from is not None:
            problems += initial_problems(self.init_from, self.stage)
        if problems:
            raise ValueError("\n".join(problems))
        return self
