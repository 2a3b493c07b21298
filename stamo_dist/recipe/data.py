"""What a recipe says of its data: the sources and their mixture."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from stamo_dist.recipe.sampling import Augment, Shuffle
from stamo_dist.recipe.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section, Weight


class SourceConfig(Section):
    """One data source of the mixture."""

    path: str | list[str] = Field(
        description="Folder or URL (s3://, gs://, hf://datasets/OWNER/NAME, …) written by `stamo data convert`; a list "
        "of them is one source."
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

    @field_validator("cameras")
    @classmethod
    def _cameras_once(cls, cameras: list[str] | None) -> list[str] | None:
        given = cameras or []
        if twice := [name for name in dict.fromkeys(given) if given.count(name) > 1]:
            raise ValueError(f"{', '.join(twice)}: given twice; keep one of them")
        return cameras

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    def weights(self, frames: int) -> dict[int, float]:
        """Optimizer step → weight from there on, for a source with this many frames."""
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
        None,
        description="GB of remote shards kept there, on each node; those used longest ago are removed. No limit when "
        "omitted.",
    )
    fetch_ahead: PositiveInt = Field(
        16,
        description="Batches whose remote shards are fetched in advance, at least; fewer where the cache is too small.",
    )
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
        """Share of the samples of each source at step 0; None if it depends on the number of frames."""
        used = self.used
        if any(source.weight == "natural" for source in used.values()):
            return None
        weights = {name: source.weights(0)[0] ** (1 / self.temperature) for name, source in used.items()}
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}


def data_problems(data: Data, stage: str, latent: str) -> list[str]:
    """Problems: data fields that contradict each other, the stage or `model.vae.latent`."""
    problems = []
    weights = [source.weights(frames=1) for source in data.sources.values()]
    for step in sorted({0, *(at for steps in weights for at in steps)}):
        if not any(steps[max(at for at in steps if at <= step)] for steps in weights):
            when = f" from step {step} on" if step else ""
            problems.append(
                f"data.sources: the weights sum to nothing{when}; give at least one source a weight above 0"
            )
    for name, source in data.sources.items():
        if source.horizon is not None and source.horizon > data.horizon:
            problems.append(f"data.sources.{name}.horizon: {source.horizon} is more than data.horizon {data.horizon}")
    if data.latents == "cached":
        if data.horizon and data.target:
            problems.append("data.latents: only the frame at t has cached latents; set data.target: false or online")
        if data.augment.active:
            problems.append("data.latents: cached latents cannot be augmented; set data.augment off or latents: online")
        if latent == "sample":
            problems.append("data.latents: the cache holds posterior means; set model.vae.latent: mean")
        if stage == "vae":
            problems.append("data.latents: the vae stage needs the pixels; set data.latents: online")
    return problems
