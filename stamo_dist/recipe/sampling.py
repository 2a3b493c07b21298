"""How samples are ordered and augmented."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stamo_dist.recipe.section import Fraction, PositiveInt, Section


class Shuffle(Section):
    """Sample order: mosaicml-streaming's, elastic in the number of processes."""

    enabled: bool = Field(True, description="Shuffle the samples; false reads every source in its stored order.")
    algorithm: Literal["py1e", "py1br", "py1s", "py2s", "naive"] = Field(
        "py1e", description="streaming's shuffle algorithm, applied to groups of about a million samples of a source."
    )
    block_size: PositiveInt = Field(262_144, description="Samples that are shuffled together.")


class Augment(Section):
    """Image augmentation, keyed by (seed, epoch, sample): workers and restarts do not change it."""

    crop: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Smallest side of the random crop relative to the image; 1 turns cropping off."
    )
    brightness: Fraction = Field(0.0, description="Largest relative change of brightness.")
    contrast: Fraction = Field(0.0, description="Largest relative change of contrast.")

    @property
    def active(self) -> bool:
        return self.crop < 1 or self.brightness > 0 or self.contrast > 0
