"""What a recipe may say. Every field carries its own one-line documentation (`stamo recipe explain FIELD`).

Nothing here imports torch: a login node validates recipes with pydantic alone.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stamo_dist.recipe.evaluation import Evaluate, evaluate_problems
from stamo_dist.recipe.policy import Policy, policy_problems
from stamo_dist.recipe.sampling import Augment, Shuffle
from stamo_dist.recipe.section import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Weight,
)
from stamo_dist.recipe.training import Optimizer, Strategy, Train, training_problems


class SourceConfig(Section):
    """One data source of the mixture."""

    path: str | list[str] = Field(
        description="Folder or URL (s3://, gs://, …) written by `stamo data convert`; a list of them is one source."
    )
    weight: Weight | Literal["natural"] | dict[NonNegativeInt, Weight] = Field(
        1.0,
        description="Share of training samples, relative to the other sources' weights; 0 leaves the source out; "
        "natural: its number of frames; {0: 0.2, 50_000: 0.5}: changes at that optimizer step.",
    )
    split: str = Field("train", description="Which split of the source to train on.")
    cameras: list[str] | None = Field(None, description="Cameras to use; all of the source's when omitted.")
    max_epochs: PositiveFloat | None = Field(
        None, description="Most times each frame is read in the run; then the other sources share its part."
    )
    horizon: PositiveInt | None = Field(
        None, description="data.horizon of this source, at most that: at 5 Hz fewer frames are as long as at 20 Hz."
    )
    actions: bool = Field(True, description="Read its actions; false takes it as video, whatever it holds.")
    labelled: Fraction = Field(
        1.0,
        description="Share of its episodes, evenly spread, whose actions a policy learns; it sees the rest as video.",
    )
    instruction: str | None = Field(
        None, description="Instruction of its episodes that have none; a policy needs one for each."
    )

    @field_validator("weight")
    @classmethod
    def _begins_at_zero(cls, weight: Any) -> Any:
        if isinstance(weight, dict) and 0 not in weight:
            raise ValueError("a weight that changes needs its value at step 0, e.g. {0: 1, 50_000: 2}")
        return weight

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    def weights(self, frames: int) -> dict[int, float]:
        """Optimizer step → weight from there on, of a source of so many frames."""
        if isinstance(self.weight, dict):
            return dict(self.weight)
        return {0: float(frames) if self.weight == "natural" else self.weight}

    @property
    def used(self) -> bool:
        return self.weight == "natural" or any(self.weights(0).values())


class Data(Section):
    """What the run reads."""

    sources: dict[str, SourceConfig] = Field(description="Name → source; the weights mix them.")
    image_size: PositiveInt = Field(256, description="Side of the square frames in the shards, in pixels.")
    temperature: PositiveFloat = Field(
        1.0, description="Shares are weights to the power 1 / temperature: above 1 they move towards equal shares."
    )
    horizon: NonNegativeInt = Field(
        0, description="Frames from t to the target frame, and actions in a chunk; 0 reads single frames."
    )
    target: bool = Field(True, description="With a horizon: also read the frame at t + horizon.")
    views: PositiveInt = Field(
        1, description="Cameras read of each moment, a source's first ones; with 1 each camera is samples of its own."
    )
    shuffle: Shuffle = Shuffle()
    augment: Augment = Augment()
    latents: Literal["online", "cached"] = Field(
        "online", description="online: the frozen VAE runs in the step; cached: read what `stamo encode` wrote."
    )
    workers: NonNegativeInt = Field(4, description="Loader processes per rank; 0 decodes in the training process.")
    prefetch: PositiveInt = Field(2, description="Batches kept ready for each worker.")
    cache: str = Field("~/.cache/stamo", description="Where remote shards are kept on local disk.")
    cache_limit: PositiveFloat | None = Field(
        None, description="GB of remote shards kept there; those used longest ago are removed. No limit when omitted."
    )
    fetch_ahead: PositiveInt = Field(16, description="Batches whose remote shards are fetched in advance.")
    on_bad_sample: Literal["raise", "skip"] = Field(
        "raise",
        description="Unreadable shards or frames end the run, or another frame of the source is taken and counted.",
    )
    max_bad_samples: NonNegativeInt | None = Field(
        1000, description="With skip: more replaced samples of one source than this end the run; null: no limit."
    )
    timeout: PositiveFloat = Field(
        1800.0, description="Seconds to wait for one batch before the run ends, naming the shard that is stuck."
    )

    @field_validator("sources")
    @classmethod
    def _names_are_plain(cls, sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        bad = [name for name in sources if not re.fullmatch(r"\w[\w-]*", name, re.ASCII)]
        if bad:
            raise ValueError(f"a source's name has letters, digits, _ and - only, unlike {', '.join(map(repr, bad))}")
        return sources

    @property
    def used(self) -> dict[str, SourceConfig]:
        """The sources with a weight above 0 at some step."""
        return {name: source for name, source in self.sources.items() if source.used}

    def first_shares(self) -> dict[str, float] | None:
        """Share of the samples of each source at step 0; None where it depends on how many frames there are."""
        used = self.used
        if any(source.weight == "natural" for source in used.values()):
            return None
        weights = {name: source.weights(0)[0] ** (1 / self.temperature) for name, source in used.items()}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}


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
    """Weights & Biases. metrics.jsonl is written first and always."""

    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="offline needs no key and can be synced later with `wandb sync`."
    )
    project: str = Field("stamo-dist", description="W&B project.")
    entity: str | None = Field(None, description="W&B entity.")
    tags: list[str] = Field(default_factory=list, description="W&B tags.")


class Recipe(Section):
    """One run: data, model, schedule, strategy."""

    name: str = Field("", description="Name of the run; the recipe's file name when omitted.")
    stage: Literal["tokenizer", "vae", "policy"] = Field("tokenizer", description="What is trained.")
    run_dir: str = Field("", description="The run folder; runs/NAME when omitted.")
    seed: NonNegativeInt = Field(0, description="Seed of initialisation, sample order, augmentation and noise.")
    data: Data
    model: Model = Model()
    flow: Flow = Flow()
    policy: Policy = Policy()
    optimizer: Optimizer = Optimizer()
    train: Train
    strategy: Strategy = Strategy()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _fields_agree(self) -> Recipe:
        problems = []
        weights = [source.weights(frames=1) for source in self.data.sources.values()]
        for step in sorted({0, *(at for steps in weights for at in steps)}):
            if not any(steps[max(at for at in steps if at <= step)] for steps in weights):
                when = f" from step {step} on" if step else ""
                problems.append(
                    f"data.sources: the weights sum to nothing{when}; give at least one source a weight above 0"
                )
        for name, source in self.data.sources.items():
            if source.horizon is not None and source.horizon > self.data.horizon:
                problems.append(
                    f"data.sources.{name}.horizon: {source.horizon} is more than data.horizon {self.data.horizon}"
                )
        if self.data.latents == "cached" and self.data.horizon and self.data.target:
            problems.append("data.latents: only the frame at t has cached latents; set data.target: false or online")
        if self.data.latents == "cached" and self.data.augment.active:
            problems.append("data.latents: cached latents cannot be augmented; set data.augment off or latents: online")
        if self.data.latents == "cached" and self.model.vae.latent == "sample":
            problems.append("data.latents: the cache holds posterior means; set model.vae.latent: mean")
        if self.data.latents == "cached" and self.stage == "vae":
            problems.append("data.latents: the vae stage needs the pixels; set data.latents: online")
        problems += training_problems(self.train, self.strategy, self.stage)
        if self.data.views > 1 and self.stage != "policy":
            problems.append(
                f"data.views: only a policy looks at {self.data.views} cameras of a moment; set data.views: 1"
            )
        problems += evaluate_problems(self.evaluate, self.stage, self.train.checkpoint.every, self.data)
        if self.stage == "policy":
            problems += policy_problems(self.policy, self.data)
        if problems:
            raise ValueError("\n".join(problems))
        return self
