"""How samples are ordered and augmented."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stamo_dist.recipe.section import Fraction, PositiveInt, Section

#: Of the random crop and of the centre crop after it (moojink/openvla-oft, prismatic/vla/datasets/datasets.py).
OPENVLA_AREA = 0.9


class Shuffle(Section):
    """Sample order, the same on any number of processes."""

    enabled: bool = Field(True, description="Shuffle the samples; false reads every source in its stored order.")
    order: Literal["lanes", "groups"] = Field(
        "lanes",
        description="lanes: a batch draws on `lanes` shards, and a node needs its own lanes' shards only; groups: "
        "streaming's shuffle of about a million samples of a source at a time, for which every node needs every shard.",
    )
    lanes: PositiveInt = Field(
        4096,
        description="With lanes: shards read at a time, over all nodes; a source has its part, and at least 8.",
    )
    algorithm: Literal["py1e", "py1br", "py1s", "py2s", "naive"] = Field(
        "py1e", description="With groups: streaming's shuffle algorithm."
    )
    block_size: PositiveInt = Field(262_144, description="With groups: samples that are shuffled together.")

    @property
    def in_lanes(self) -> bool:
        return self.enabled and self.order == "lanes"


class Augment(Section):
    """Image augmentation, keyed by (seed, epoch, sample): workers and restarts do not change it."""

    preset: Literal["openvla"] | None = Field(
        None,
        description="openvla: as OpenVLA's training does, in place of the fields below: a window of 0.9 of the area, "
        "brightness ±0.2, contrast and saturation ×0.8 to 1.2, hue ±0.05. Such a policy later sees the centre of 0.9.",
    )
    crop: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Smallest side of the random crop relative to the image; 1 turns cropping off."
    )
    brightness: Fraction = Field(0.0, description="Largest relative change of brightness.")
    contrast: Fraction = Field(0.0, description="Largest relative change of contrast.")

    @property
    def active(self) -> bool:
        return self.preset is not None or self.crop < 1 or self.brightness > 0 or self.contrast > 0

    @property
    def middle(self) -> float:
        """Fraction of the area of the centre crop at inference; 1 without a preset, whose crops include full frames."""
        return OPENVLA_AREA if self.preset == "openvla" else 1.0

    @model_validator(mode="after")
    def _one_way(self) -> Augment:
        if self.preset is not None and (self.crop < 1 or self.brightness > 0 or self.contrast > 0):
            raise ValueError(f"preset: {self.preset} stands in place of crop, brightness and contrast; remove them")
        return self
